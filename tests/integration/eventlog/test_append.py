"""The writer of the log against a real Postgres: order, guards, atomicity, folds."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import anyio
import orjson
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from managed_agents.core import faults, limits
from managed_agents.db.engine import Database
from managed_agents.eventlog import append as log
from managed_agents.eventlog import batch, fold, read
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.append import session_state_of, thread_state_of
from managed_agents.eventlog.batch import Append, Appender, AppendUncertain, Rest
from managed_agents.eventlog.events import NewEvent, SpanUsage, StoredEvent
from managed_agents.eventlog.fold import SessionState, ThreadState
from tests.support import sessions
from tests.support.waiting import until

pytestmark = pytest.mark.anyio
OWNER = "wrk_me"


@asynccontextmanager
async def appender(db: Database, published: list[StoredEvent] | None = None) -> AsyncIterator[Appender]:
    writer = Appender(db, (published if published is not None else []).extend)
    async with anyio.create_task_group() as group:
        await group.start(writer.run)
        yield writer
        group.cancel_scope.cancel()


async def owned(db: Database) -> tuple[str, str]:
    return await sessions.session(db, await sessions.workspace(db), owner=OWNER, epoch=3)


def message(thread_id: str, words: str = "hi") -> NewEvent:
    return ev.new_event("agent.message", thread_id, {"content": [{"type": "text", "text": words}]})


def group(session_id: str, events: Sequence[NewEvent], **more: Any) -> Append:
    return Append(session_id, events, OWNER, more.pop("epoch", 3), **more)


async def rows(db: Database, session_id: str) -> list[StoredEvent]:
    async with db.transaction() as tx:
        return await read.after(tx, session_id, 0, limit=10_000)


async def row(db: Database, table: str, row_id: str) -> Any:
    async with db.transaction() as tx:
        return (await tx.execute(text(f"SELECT * FROM {table} WHERE id = :id"), {"id": row_id})).one()


@pytest.mark.requirement("OBS-023")
async def test_concurrent_appends_leave_no_gap_and_processed_at_strictly_rises(db: Database) -> None:
    workspace_id = await sessions.workspace(db)
    targets = [await sessions.session(db, workspace_id, owner=OWNER, epoch=3) for _ in range(5)]
    published: list[StoredEvent] = []
    async with appender(db, published) as writer, anyio.create_task_group() as tasks:
        for session_id, thread_id in targets:
            for n in range(40):
                tasks.start_soon(writer.append, group(session_id, [message(thread_id, str(n)), message(thread_id)]))
    for session_id, _ in targets:
        found = await rows(db, session_id)
        assert [event.seq for event in found] == list(range(1, 81))
        stamps = [event.json()["processed_at"] for event in found]
        assert stamps == sorted(set(stamps))
        assert all(len(stamp) == len("2026-11-01T00:00:00.000001Z") for stamp in stamps)
        assert [event.body for event in found] == [e.body for e in published if e.session_id == session_id]


async def test_a_stale_epoch_a_foreign_owner_and_a_deleted_session_fail_only_their_own_caller(db: Database) -> None:
    good, thread = await owned(db)
    gone, gone_thread = await sessions.session(db, await sessions.workspace(db), owner=OWNER, epoch=3)
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE sessions SET deleted_at = now() WHERE id = :id"), {"id": gone})
    results: dict[str, object] = {}

    async def attempt(name: str, append: Append) -> None:
        try:
            results[name] = len(await writer.append(append))
        except Exception as error:
            results[name] = type(error)

    async with appender(db) as writer, anyio.create_task_group() as tasks:
        tasks.start_soon(attempt, "stale", group(good, [message(thread)], epoch=2))
        tasks.start_soon(attempt, "foreign", Append(good, [message(thread)], "wrk_other", 3))
        tasks.start_soon(attempt, "gone", group(gone, [message(gone_thread)]))
        tasks.start_soon(attempt, "missing", group("sesn_none", [message(thread)]))
        tasks.start_soon(attempt, "good", group(good, [message(thread), message(thread)]))
    assert results == {
        "stale": log.LeaseLost,
        "foreign": log.LeaseLost,
        "gone": log.SessionGone,
        "missing": log.SessionGone,
        "good": 2,
    }
    assert len(await rows(db, good)) == 2


@pytest.mark.requirement("OBS-045")
async def test_the_resting_step_is_refused_when_input_moved(db: Database) -> None:
    session_id, thread_id = await owned(db)
    async with appender(db) as writer:
        await writer.append(group(session_id, ev.running(thread_id, "a")))
        async with db.transaction() as tx:
            await tx.execute(text("UPDATE sessions SET input_seq = 1 WHERE id = :id"), {"id": session_id})
        idle = ev.idle(thread_id, "a", {"type": "end_turn"})
        with pytest.raises(log.NewInput):
            await writer.append(group(session_id, idle, expect_input_seq=0, rest=Rest()))
        assert len(await rows(db, session_id)) == 2
        await writer.append(group(session_id, idle, expect_input_seq=1, rest=Rest()))
    stored = await row(db, "sessions", session_id)
    assert (stored.status, stored.owner, stored.handled_seq) == ("idle", None, 1)


@pytest.mark.requirement("EVT-030")
async def test_taking_up_a_queued_event_moves_it_under_its_id_and_only_once(db: Database) -> None:
    session_id, thread_id = await owned(db)
    async with db.transaction() as tx:
        head = await log.lock(tx, session_id)
        assert head is not None
        [queued] = head.enqueue([message(thread_id)], maximum=10)
        await log.write(tx, [head])
    async with appender(db) as writer:
        await writer.append(group(session_id, [queued.taken_up()], taken=[queued]))
        with pytest.raises(log.TakenAlready):
            await writer.append(group(session_id, [queued.taken_up()], taken=[queued]))
    found = await rows(db, session_id)
    assert [event.id for event in found] == [queued.id]
    async with db.transaction() as tx:
        assert await read.inbox_after(tx, session_id) == []
    assert (await row(db, "sessions", session_id)).inbox_count == 0


async def test_a_session_locked_by_someone_else_does_not_hold_up_the_others(db: Database) -> None:
    workspace_id = await sessions.workspace(db)
    slow, slow_thread = await sessions.session(db, workspace_id, owner=OWNER, epoch=3)
    fast, fast_thread = await sessions.session(db, workspace_id, owner=OWNER, epoch=3)
    async with appender(db) as writer, anyio.create_task_group() as tasks, db.transaction() as tx:
        await log.lock(tx, slow)
        tasks.start_soon(writer.append, group(slow, [message(slow_thread)]))
        with anyio.fail_after(3):
            await writer.append(group(fast, [message(fast_thread)]))
        assert await rows(db, slow) == []
    assert len(await rows(db, slow)) == 1


async def test_many_locked_sessions_do_not_hold_up_the_others_either(db: Database) -> None:
    workspace_id = await sessions.workspace(db)
    slow = [await sessions.session(db, workspace_id, owner=OWNER, epoch=3) for _ in range(4)]
    fast, fast_thread = await sessions.session(db, workspace_id, owner=OWNER, epoch=3)
    async with appender(db) as writer, anyio.create_task_group() as tasks, db.transaction() as tx:
        for session_id, thread_id in slow:
            await log.lock(tx, session_id)
            tasks.start_soon(writer.append, group(session_id, [message(thread_id)]))
        with anyio.fail_after(3):
            for _ in range(3):
                await writer.append(group(fast, [message(fast_thread)]))
    for session_id, _ in slow:
        assert len(await rows(db, session_id)) == 1


async def test_the_database_refuses_to_change_or_remove_events(db: Database) -> None:
    session_id, thread_id = await owned(db)
    async with appender(db) as writer:
        await writer.append(group(session_id, [message(thread_id)]))
    for statement in (
        "UPDATE events SET body = ''",
        "DELETE FROM events",
        "TRUNCATE events",
        "SET LOCAL managed_agents.erasing = 'on'; UPDATE events SET seq = 7",
    ):
        with pytest.raises(DBAPIError, match="append-only"):
            async with db.transaction() as tx:
                for part in statement.split("; "):
                    await tx.execute(text(part))
    assert len(await rows(db, session_id)) == 1


async def test_folding_the_log_again_gives_the_stored_rows(db: Database) -> None:
    session_id, thread_id = await owned(db)
    usage = SpanUsage(11, 7, 5, 3, 2, 0, Decimal("0.000123"))
    async with appender(db) as writer:
        for _ in range(3):
            start = ev.span_start(thread_id)
            await writer.append(group(session_id, [*ev.running(thread_id, "a"), start]))
            end = ev.span_end(thread_id, start.id, usage, is_error=False, private={"response": {}})
            await writer.append(group(session_id, [end, *ev.idle(thread_id, "a", {"type": "end_turn"})]))
        await writer.append(group(session_id, ev.running(thread_id, "a")))
        await writer.append(group(session_id, ev.rescheduled(thread_id, "a")))
    again, thread = SessionState(), ThreadState()
    async with db.transaction() as tx:
        found = (await tx.execute(text("SELECT * FROM events WHERE session_id = :id ORDER BY seq"), {"id": session_id})).all()
    for event in found:
        private = orjson.loads(event.private) if event.private else {}
        spent = SpanUsage.from_json(private["usage"]) if "usage" in private else None
        fold.apply(again, thread, event.type, event.processed_at, spent)
    assert again == session_state_of(await row(db, "sessions", session_id))
    assert thread == thread_state_of(await row(db, "session_threads", thread_id))
    assert again.status == "rescheduling"
    # What was told to clients is the fold at that position: running time up to the event before it.
    told = [event.json()["usage"] for event in await rows(db, session_id) if event.type == "session.usage"]
    assert [figure["input_tokens"] for figure in told] == [11, 22, 33]


async def test_commit_then_lost_connection_is_reported_as_uncertain_not_as_failure(db: Database) -> None:
    session_id, thread_id = await owned(db)

    def cut() -> None:
        raise ConnectionResetError

    async with appender(db) as writer:
        faults.arm(log.BEFORE_COMMIT, cut)
        with pytest.raises(AppendUncertain):
            await writer.append(group(session_id, [message(thread_id)]))
        faults.disarm()
        await writer.append(group(session_id, [message(thread_id)]))
    assert [event.seq for event in await rows(db, session_id)] == [1]


async def test_events_that_cannot_be_folded_fail_alone(db: Database) -> None:
    session_id, thread_id = await owned(db)
    other, other_thread = await sessions.session(db, await sessions.workspace(db), owner=OWNER, epoch=3)
    async with appender(db) as writer:
        await writer.append(group(session_id, ev.terminated(thread_id, "a")))
        with pytest.raises(AssertionError):
            await writer.append(group(session_id, ev.running(thread_id, "a")))
        await writer.append(group(other, [message(other_thread)]))
    assert len(await rows(db, session_id)) == 2


@pytest.mark.requirement("EVT-067")
async def test_bodies_may_hold_what_jsonb_refuses(db: Database) -> None:
    session_id, thread_id = await owned(db)
    words = "nul \x00 and \U0001f600"
    async with appender(db) as writer:
        await writer.append(group(session_id, [message(thread_id, words)]))
    [event] = await rows(db, session_id)
    assert event.json()["content"][0]["text"] == words


def test_every_fault_point_of_the_log_is_registered() -> None:
    assert {log.BEFORE_WRITE, log.BEFORE_COMMIT, log.BEFORE_KNOWN, batch.COMMITTED} <= set(faults.REGISTERED)


async def test_an_append_that_gets_no_connection_in_time_is_tried_again(
    db: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session_id, thread_id = await owned(db)
    monkeypatch.setattr(limits, "LOCK_TIMEOUT_SECONDS", 2.0)
    narrow = Database(database_url, pool=1, application_name="narrow")
    async with appender(narrow) as writer, anyio.create_task_group() as tasks, narrow.transaction():
        tasks.start_soon(writer.append, group(session_id, [message(thread_id)]))
        await until(lambda: "trying each alone: TimeoutError" in caplog.text)
    await narrow.dispose()
    assert len(await rows(db, session_id)) == 1
