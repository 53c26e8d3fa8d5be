"""Callers of the appender are shielded from cancellation: however its writer ends, none of them may wait for ever."""

import anyio
import pytest
from anyio.abc import TaskStatus
from sqlalchemy import text

from managed_agents.core import faults
from managed_agents.db.engine import Database
from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.batch import COMMITTED, Append, Appender, AppendUncertain
from tests.support import sessions

pytestmark = pytest.mark.anyio


def leaves(error: BaseException) -> list[BaseException]:
    return [leaf for inner in error.exceptions for leaf in leaves(inner)] if isinstance(error, BaseExceptionGroup) else [error]


@pytest.mark.parametrize(
    ("point", "known"),
    [(log.BEFORE_WRITE, False), (log.BEFORE_COMMIT, False), (COMMITTED, False), (log.BEFORE_KNOWN, True), (COMMITTED, True)],
)
async def test_a_writer_that_fails_answers_whoever_waits(db: Database, point: str, known: bool) -> None:
    session_id, thread_id = await sessions.session(db, await sessions.workspace(db), owner="wrk_a")
    appender = Appender(db, lambda _rows: None)
    told: list[BaseException] = []

    async def write() -> None:
        with anyio.CancelScope(shield=True):
            if known:
                await appender.append(Append(session_id, [ev.span_start(thread_id)], "wrk_a", 0))
            faults.arm(point, "raise")
            try:
                await appender.append(Append(session_id, [ev.span_start(thread_id)], "wrk_a", 0))
            except AppendUncertain as error:
                told.append(error)

    with anyio.fail_after(10):
        with pytest.raises(BaseExceptionGroup) as raised:
            async with anyio.create_task_group() as group:
                group.start_soon(write)
                await group.start(appender.run)
        assert {type(leaf) for leaf in leaves(raised.value)} == {faults.FaultInjected}
        assert len(told) == 1
        with pytest.raises(AppendUncertain):
            await appender.append(Append(session_id, [ev.span_start(thread_id)], "wrk_a", 0))
    async with db.transaction() as tx:
        written = (await tx.execute(text("SELECT count(*) FROM events"))).scalar_one()
    assert written == known + (point == COMMITTED)


async def test_a_writer_that_is_cancelled_answers_whoever_waits(db: Database) -> None:
    session_id, thread_id = await sessions.session(db, await sessions.workspace(db), owner="wrk_a")
    appender = Appender(db, lambda _rows: None)
    async with db.transaction() as tx, anyio.create_task_group() as outer:
        await tx.execute(text("SELECT 1 FROM sessions FOR UPDATE"))  # it cannot be written now
        writer = anyio.CancelScope()

        async def run(*, task_status: TaskStatus[None]) -> None:
            with writer:
                await appender.run(task_status=task_status)

        await outer.start(run)
        outer.start_soon(_cancel_later, writer)
        with anyio.fail_after(10), pytest.raises(AppendUncertain):
            await appender.append(Append(session_id, [ev.span_start(thread_id)], "wrk_a", 0))


async def _cancel_later(scope: anyio.CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()
