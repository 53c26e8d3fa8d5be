"""Which session is claimed first, where more wait than there is room for."""

import pytest
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.eventlog.tables import SESSIONS
from managed_agents.harness import lease
from tests.support import sessions

pytestmark = pytest.mark.anyio


@pytest.fixture
async def worker(db: Database) -> str:
    async with db.transaction() as tx:
        await tx.execute(text("INSERT INTO workers (id, host, pid) VALUES ('wrk_living', 'here', 1)"))
    return "wrk_living"


async def waiting(db: Database, workspace_id: str, *, age_seconds: float, **values: object) -> str:
    """A session with work, whose running period began so long ago."""
    session_id, _ = await sessions.session(db, workspace_id)
    columns = {"input_seq": 1, "status": "running", **values}
    since = "running_since = clock_timestamp() - make_interval(secs => :age)"
    assignments = ", ".join(f"{name} = :{name}" for name in columns)
    async with db.transaction() as tx:
        await tx.execute(
            text(f"UPDATE sessions SET {since}, {assignments} WHERE id = :id"),
            {"id": session_id, "age": age_seconds, **columns},
        )
    return session_id


async def copied(db: Database, session_id: str, count: int) -> None:
    """So many more like it."""
    columns = [column.name for column in SESSIONS.columns if column.computed is None]
    values = ", ".join("'sesn_crowd' || n" if name == "id" else f's."{name}"' for name in columns)
    names = ", ".join(f'"{name}"' for name in columns)
    async with db.transaction() as tx:
        await tx.execute(
            text(
                f"INSERT INTO sessions ({names}) SELECT {values} FROM sessions s, generate_series(1, :count) n WHERE s.id = :id"
            ),
            {"id": session_id, "count": count},
        )
        await tx.execute(text("ANALYZE sessions"))


async def claimed(db: Database, worker: str, limit: int = 1) -> set[str]:
    async with db.autocommit() as tx:
        return {claim.session_id for claim in (await lease.claim(tx, worker, limit=limit))[0]}


async def test_a_workspace_with_a_thousand_sessions_leaves_another_its_turn(db: Database, worker: str) -> None:
    crowd, few = await sessions.workspace(db), await sessions.workspace(db)
    first = await waiting(db, crowd, age_seconds=600)
    await copied(db, first, 999)
    late = {await waiting(db, few, age_seconds=age) for age in (3, 2, 1)}
    # Eight turns: each workspace gets its share, three of them are all that the small one wants.
    found = await claimed(db, worker, 8)
    assert late < found
    assert len(found) == 8
    # All eight run. What the small workspace wants next comes before the other 995.
    later = await waiting(db, few, age_seconds=0)
    assert await claimed(db, worker) == {later}


async def test_within_a_workspace_the_oldest_running_period_goes_first_whatever_was_sent_since(db: Database, worker: str) -> None:
    workspace_id = await sessions.workspace(db)
    newest = await waiting(db, workspace_id, age_seconds=1)
    oldest = await waiting(db, workspace_id, age_seconds=60)
    async with db.transaction() as tx:  # a client that keeps talking
        await tx.execute(text("UPDATE sessions SET input_seq = 9, updated_at = clock_timestamp() WHERE id = :id"), {"id": oldest})
    assert [await claimed(db, worker), await claimed(db, worker)] == [{oldest}, {newest}]


async def test_an_interrupt_of_a_session_that_waits_for_a_retry_is_not_put_off(db: Database, worker: str) -> None:
    workspace_id = await sessions.workspace(db)
    await waiting(db, workspace_id, age_seconds=5)
    parked, _ = await sessions.session(db, workspace_id)
    async with db.transaction() as tx:
        await tx.execute(
            text(
                "UPDATE sessions SET input_seq = 1, status = 'rescheduling', due_at = clock_timestamp() + interval '900 s', "
                "updated_at = clock_timestamp() - interval '60 s' WHERE id = :id"
            ),
            {"id": parked},
        )
    assert await claimed(db, worker) == {parked}


async def test_the_order_of_ten_thousand_waiting_sessions_is_found_quickly(db: Database, worker: str) -> None:
    first = await waiting(db, await sessions.workspace(db), age_seconds=600)
    await copied(db, first, 10_000)
    async with db.transaction() as tx:
        await tx.execute(text("SET LOCAL statement_timeout = '2s'"))
        assert len((await lease.claim(tx, worker, limit=200))[0]) == 200
