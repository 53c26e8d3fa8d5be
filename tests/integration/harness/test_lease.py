"""Claims against a real database."""

import pytest
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.harness import lease
from tests.support import sessions

pytestmark = pytest.mark.anyio

TTL_SECONDS = 15.0


async def test_a_session_whose_owner_is_not_registered_is_freed(db: Database) -> None:
    workspace_id = await sessions.workspace(db)
    session_id, _ = await sessions.session(db, workspace_id, owner="wrk_buried", epoch=3)
    async with db.transaction() as tx:
        assert await lease.free_dead(tx, ttl_seconds=TTL_SECONDS) == [session_id]
        row = (await tx.execute(text("SELECT owner, epoch FROM sessions"))).one()
    assert tuple(row) == (None, 4)


async def test_a_worker_that_is_not_registered_claims_nothing(db: Database) -> None:
    workspace_id = await sessions.workspace(db)
    session_id, _ = await sessions.session(db, workspace_id)
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE sessions SET input_seq = 1"))
        assert await lease.claim(tx, "wrk_living", limit=10) == []
        await tx.execute(
            text("INSERT INTO workers (id, host, pid) VALUES ('wrk_living', 'here', 1)"),
        )
        assert [claim.session_id for claim in await lease.claim(tx, "wrk_living", limit=10)] == [session_id]


async def test_a_worker_without_its_advisory_lock_is_dead(db: Database) -> None:
    workspace_id = await sessions.workspace(db)
    async with db.transaction() as tx:
        await tx.execute(text("INSERT INTO workers (id, host, pid) VALUES ('wrk_a', 'here', 1), ('wrk_b', 'here', 2)"))
    dead_id, _ = await sessions.session(db, workspace_id, owner="wrk_a")
    await sessions.session(db, workspace_id, owner="wrk_b")
    async with db.transaction() as holder, db.transaction() as tx:
        await holder.execute(
            text("SELECT pg_advisory_xact_lock(:lock_class, lock_key::int) FROM workers WHERE id = 'wrk_b'"),
            {"lock_class": lease.LOCK_CLASS},
        )
        assert await lease.free_dead(tx, ttl_seconds=TTL_SECONDS) == [dead_id]
