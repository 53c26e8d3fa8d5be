"""Claims against a real database."""

import anyio
import pytest
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.batch import Append, Appender
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
        assert await lease.claim(tx, "wrk_living", limit=10) == ([], [])
        await tx.execute(
            text("INSERT INTO workers (id, host, pid) VALUES ('wrk_living', 'here', 1)"),
        )
        assert [claim.session_id for claim in (await lease.claim(tx, "wrk_living", limit=10))[0]] == [session_id]


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


async def crashes_of(db: Database, session_id: str) -> tuple[int, bool]:
    async with db.transaction() as tx:
        statement = text("SELECT crashes, not_before > clock_timestamp() AS delayed FROM sessions WHERE id = :id")
        row = (await tx.execute(statement, {"id": session_id})).one()
    return row.crashes, bool(row.delayed)


async def test_deaths_of_owners_count_and_the_first_one_costs_no_time(db: Database) -> None:
    session_id, _ = await sessions.session(db, await sessions.workspace(db))
    for deaths, delayed in ((1, False), (2, True), (3, True)):
        async with db.transaction() as tx:
            await tx.execute(text("UPDATE sessions SET owner = 'wrk_dead'"))
            assert await lease.free_dead(tx, ttl_seconds=TTL_SECONDS) == [session_id]
        assert await crashes_of(db, session_id) == (deaths, delayed)


async def test_progress_makes_up_for_crashes_and_spans_are_none(db: Database) -> None:
    session_id, thread_id = await sessions.session(db, await sessions.workspace(db), owner="wrk_a")
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE sessions SET crashes = 3"))
    appender = Appender(db, lambda _rows: None)
    async with anyio.create_task_group() as group:
        await group.start(appender.run)
        await appender.append(Append(session_id, [ev.span_start(thread_id)], "wrk_a", 0))
        assert (await crashes_of(db, session_id))[0] == 3
        await appender.append(Append(session_id, [ev.new_event("agent.thinking", thread_id)], "wrk_a", 0))
        assert (await crashes_of(db, session_id))[0] == 0
        group.cancel_scope.cancel()


async def test_of_the_suspects_one_runs_at_a_time_and_the_others_are_not_kept_waiting(db: Database) -> None:
    workspace_id = await sessions.workspace(db)
    suspects = {(await sessions.session(db, workspace_id))[0] for _ in range(3)}
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE sessions SET crashes = 2"))
    innocent, _ = await sessions.session(db, workspace_id)
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE sessions SET input_seq = 1"))
        await tx.execute(text("INSERT INTO workers (id, host, pid) VALUES ('wrk_a', 'here', 1), ('wrk_b', 'here', 2)"))
        claimed = {claim.session_id for claim in (await lease.claim(tx, "wrk_a", limit=10))[0]}
        assert innocent in claimed
        assert len(claimed & suspects) == 1
        assert await lease.claim(tx, "wrk_b", limit=10) == ([], [])
        # It got somewhere: the next suspect has its chance.
        await tx.execute(text("UPDATE sessions SET crashes = 0 WHERE owner IS NOT NULL"))
        ((second,), _) = await lease.claim(tx, "wrk_b", limit=10)
        assert second.session_id in suspects - claimed
