"""Events that are sent while something else happens to their session: judged on what it is when they are written."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from sqlalchemy import text

from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.core.ids import WorkspaceId
from managed_agents.db.engine import Database
from managed_agents.db.listener import LOG_CHANNEL, Doorbell, listen
from managed_agents.eventlog import append as log
from managed_agents.eventlog import read
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.subscribe import Hub
from managed_agents.resources.sessions.events_service import SessionEvents
from managed_agents.resources.sessions.schemas import SendEvents
from tests.support import sessions
from tests.support.statements import noted
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "hello"}]}


@pytest.fixture
def events(db: Database, database_url: str) -> SessionEvents:
    hub = Hub(db)
    return SessionEvents(db, Hints(hub, Doorbell(database_url)), hub)


@pytest.fixture
async def session(db: Database) -> tuple[WorkspaceId, str]:
    workspace_id = await sessions.workspace(db)
    return WorkspaceId(workspace_id), (await sessions.session(db, workspace_id))[0]


def sent(*bodies: dict[str, Any]) -> SendEvents:
    return SendEvents.model_validate({"events": list(bodies)})


def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], Awaitable[None]]) -> None:
    """Once, behind the look at a session."""
    look = log.look

    async def looking(*arguments: Any, **named: Any) -> Any:
        found = await look(*arguments, **named)
        monkeypatch.setattr(log, "look", look)
        await happens()
        return found

    monkeypatch.setattr(log, "look", looking)


def change(db: Database, session_id: str, assignment: str) -> Callable[[], Awaitable[None]]:
    async def happens() -> None:
        async with db.transaction() as tx:
            await tx.execute(text(f"UPDATE sessions SET {assignment} WHERE id = :id"), {"id": session_id})

    return happens


async def inbox(db: Database, session_id: str) -> list[int]:
    async with db.autocommit() as tx:
        return [event.inbox_seq for event in await read.inbox_after(tx, session_id)]


async def test_two_statements_are_enough(db: Database, events: SessionEvents, session: tuple[WorkspaceId, str]) -> None:
    with noted(db) as seen:
        await events.send(*session, sent(MESSAGE))
    assert len(seen) == 2
    assert await inbox(db, session[1]) == [1]


async def test_what_was_sent_at_once_is_numbered_one_after_the_other(
    db: Database, events: SessionEvents, session: tuple[WorkspaceId, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def another() -> None:
        await events.send(*session, sent(MESSAGE))

    meanwhile(monkeypatch, another)
    await events.send(*session, sent(MESSAGE, MESSAGE))
    assert await inbox(db, session[1]) == [1, 2, 3]
    async with db.autocommit() as tx:
        types = [event.type for event in await read.after(tx, session[1], 0, limit=10)]
    assert types == ["session.status_running", "session.thread_status_running"]  # said once


@pytest.mark.parametrize(
    ("assignment", "refusal"),
    [("archived_at = now()", InvalidRequest), ("status = 'terminated'", InvalidRequest), ("deleted_at = now()", NotFound)],
)
async def test_a_session_that_ends_after_the_look_takes_nothing(
    db: Database,
    events: SessionEvents,
    session: tuple[WorkspaceId, str],
    monkeypatch: pytest.MonkeyPatch,
    assignment: str,
    refusal: type[Exception],
) -> None:
    meanwhile(monkeypatch, change(db, session[1], assignment))
    with pytest.raises(refusal):
        await events.send(*session, sent(MESSAGE))
    assert await inbox(db, session[1]) == []


async def test_a_message_behind_an_interrupt_is_taken_though_that_is_taken_up_between_two_reads(
    db: Database, events: SessionEvents, session: tuple[WorkspaceId, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await change(db, session[1], """waiting = '{"sevt_call": "user.custom_tool_result"}'""")()
    await events.send(*session, sent({"type": "user.interrupt"}))

    async def taken_up() -> None:
        async with db.transaction() as tx:
            await tx.execute(text("DELETE FROM inbox WHERE session_id = :id"), {"id": session[1]})
        await change(db, session[1], "waiting = NULL, inbox_count = 0, last_seq = last_seq + 4")()

    meanwhile(monkeypatch, taken_up)
    await events.send(*session, sent(MESSAGE))
    assert await inbox(db, session[1]) == [2]


async def test_a_session_that_somebody_holds_is_waited_for(
    db: Database, events: SessionEvents, session: tuple[WorkspaceId, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, free = anyio.Event(), anyio.Event()

    async def hold() -> None:
        async with db.transaction() as tx:
            await log.lock(tx, session[1])
            held.set()
            await free.wait()

    async with anyio.create_task_group() as group:

        async def locked() -> None:
            group.start_soon(hold)
            await held.wait()
            lock = log.lock

            async def locking(*arguments: Any, **named: Any) -> Any:
                free.set()
                return await lock(*arguments, **named)

            monkeypatch.setattr(log, "lock", locking)

        meanwhile(monkeypatch, locked)
        await events.send(*session, sent(MESSAGE))
    assert await inbox(db, session[1]) == [1]


@pytest.fixture
async def rings(database_url: str) -> AsyncIterator[tuple[Doorbell, Doorbell, list[str]]]:
    """A doorbell beside the listener, another process's, and what the listener has heard."""
    own, other, heard = Doorbell(database_url), Doorbell(database_url), list[str]()
    listening = anyio.Event()

    async def connected() -> None:
        listening.set()

    async with anyio.create_task_group() as group:
        group.start_soon(own.run)
        group.start_soon(other.run)

        async def hear() -> None:
            await listen(database_url, {LOG_CHANNEL: heard.extend}, connected, beside=own)

        group.start_soon(hear)
        await listening.wait()
        yield own, other, heard
        group.cancel_scope.cancel()


async def test_a_process_does_not_hear_its_own_rings(rings: tuple[Doorbell, Doorbell, list[str]]) -> None:
    own, other, heard = rings
    own.ring(LOG_CHANNEL, "sesn_own")
    await until(lambda: not own._pending[LOG_CHANNEL])

    def heard_another() -> bool:
        other.ring(LOG_CHANNEL, "sesn_other")
        return bool(heard)

    await until(heard_another)  # the server tells of one after the other
    assert set(heard) == {"sesn_other"}
