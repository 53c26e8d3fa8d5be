"""A worker's sign of life: whatever takes its connection away, the worker registers again instead of ending."""

import anyio
import pytest
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.harness import heartbeat
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

_KILL = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND query LIKE 'INSERT INTO workers%' AND wait_event_type = 'Lock'"
)
_ALIVE = text(
    "SELECT w.id FROM workers w JOIN pg_locks l ON l.classid = :class AND l.objid = w.lock_key "
    "WHERE l.locktype = 'advisory' AND l.granted "
    "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


async def test_a_connection_that_is_lost_while_a_worker_registers_ends_nothing(db: Database, database_url: str) -> None:
    working: list[str] = []
    begun = anyio.Event()

    async def work(worker_id: str) -> None:
        working.append(worker_id)
        begun.set()
        await anyio.sleep_forever()

    async def cut() -> bool:
        async with db.autocommit() as tx:
            return bool((await tx.execute(_KILL)).all())

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            async with db.transaction() as tx:
                await tx.execute(text("LOCK TABLE workers IN ACCESS EXCLUSIVE MODE"))

                async def live() -> None:
                    await heartbeat.live(database_url, host="here", ttl_seconds=30.0, work=work)

                group.start_soon(live)
                await until(cut)
                await until(cut)  # it has come again
            await begun.wait()
            async with db.autocommit() as tx:
                alive = (await tx.execute(_ALIVE, {"class": heartbeat.LOCK_CLASS})).scalars().all()
            assert list(alive) == working
            group.cancel_scope.cancel()
    async with db.autocommit() as tx:
        assert (await tx.execute(text("SELECT count(*) FROM workers"))).scalar_one() == 0
