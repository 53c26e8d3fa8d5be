"""A worker's sign of life: whatever takes its connection away, the worker registers again instead of ending."""

import anyio
import pytest
from sqlalchemy import text

from managed_agents.core import limits
from managed_agents.db.engine import Database
from managed_agents.harness import heartbeat
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

_KILL = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND query LIKE 'INSERT INTO workers%' AND wait_event_type = 'Lock'"
)
_KILL_ALIVE = text(
    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = :class "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
_UNREGISTERING = text(
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
    "AND query LIKE 'UPDATE sessions SET owner = NULL%' AND wait_event_type = 'Lock'"
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


async def test_a_connection_that_falls_silent_while_a_worker_registers_again_is_given_up(
    db: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DATABASE_STATEMENT_SECONDS", 1.0)
    working: list[str] = []
    begun = anyio.Event()
    tried: set[int] = set()

    async def work(worker_id: str) -> None:
        working.append(worker_id)
        begun.set()
        await anyio.sleep_forever()

    async def tried_twice() -> bool:
        async with db.autocommit() as tx:
            tried.update((await tx.execute(_UNREGISTERING)).scalars())
        return len(tried) > 1

    async def alive() -> list[str]:
        async with db.autocommit() as tx:
            return list((await tx.execute(_ALIVE, {"class": heartbeat.LOCK_CLASS})).scalars())

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:

            async def live() -> None:
                await heartbeat.live(database_url, host="here", ttl_seconds=1.5, work=work)

            group.start_soon(live)
            await begun.wait()
            async with db.transaction() as tx:
                await tx.execute(text("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE"))
                async with db.autocommit() as other:
                    await other.execute(_KILL_ALIVE, {"class": heartbeat.LOCK_CLASS})
                await until(tried_twice)
            await until(lambda: len(working) > 1)

            async def settled() -> bool:
                return await alive() == working[-1:]

            await until(settled)
            group.cancel_scope.cancel()
