"""Appends to sessions that the writer wrote last: one statement, and never on a row that somebody changed."""

from typing import Any

import anyio
import pytest
from sqlalchemy import text

from managed_agents.core import faults
from managed_agents.db.engine import Database
from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.eventlog import fold
from managed_agents.eventlog.append import session_state_of
from managed_agents.eventlog.batch import AppendUncertain, Rest
from managed_agents.eventlog.events import SpanUsage
from managed_agents.eventlog.fold import SessionState, ThreadState
from tests.integration.eventlog.test_append import appender, group, message, owned, row, rows
from tests.support import sessions
from tests.support.statements import noted

pytestmark = pytest.mark.anyio


async def change(db: Database, session_id: str, assignment: str) -> None:
    async with db.transaction() as tx:
        await tx.execute(text(f"UPDATE sessions SET {assignment} WHERE id = :id"), {"id": session_id})


async def test_a_session_written_last_by_this_process_takes_one_statement(db: Database) -> None:
    session_id, thread_id = await owned(db)
    async with appender(db) as writer:
        await writer.append(group(session_id, ev.running(thread_id, "a")))
        with noted(db) as seen:
            start = ev.span_start(thread_id)
            await writer.append(group(session_id, [start]))
            end = ev.span_end(thread_id, start.id, SpanUsage(5, 7), is_error=False, private={"response": {}})
            await writer.append(group(session_id, [end, message(thread_id)]))
            idle = ev.idle(thread_id, "a", {"type": "end_turn"})
            await writer.append(group(session_id, idle, expect_input_seq=0, rest=Rest()))
        assert len(seen) == 3
        assert all("FOR UPDATE OF s SKIP LOCKED" in statement for statement in seen)
    found = await rows(db, session_id)
    assert [stored.seq for stored in found] == list(range(1, len(found) + 1))
    stored = await row(db, "sessions", session_id)
    assert (stored.status, stored.owner, stored.output_tokens) == ("idle", None, 7)
    assert (await row(db, "session_threads", thread_id)).output_tokens == 7


@pytest.mark.parametrize(
    ("assignment", "refusal"),
    [
        ("epoch = epoch + 1", log.LeaseLost),
        ("owner = 'wrk_other'", log.LeaseLost),
        ("owner = NULL", log.LeaseLost),
        ("deleted_at = now()", log.SessionGone),
        ("input_seq = input_seq + 1", log.NewInput),
        ("budget_cents = 0", log.BudgetReached),
    ],
)
async def test_what_changed_since_is_seen(db: Database, assignment: str, refusal: type[Exception]) -> None:
    session_id, thread_id = await owned(db)
    async with appender(db) as writer:
        await writer.append(group(session_id, ev.running(thread_id, "a")))
        await change(db, session_id, assignment)
        with pytest.raises(refusal):
            await writer.append(group(session_id, [message(thread_id)], expect_input_seq=0, within_budget=True))
    assert len(await rows(db, session_id)) == 2


async def test_a_guard_that_only_the_known_head_fails_is_no_refusal(db: Database) -> None:
    session_id, thread_id = await owned(db)
    await change(db, session_id, "budget_cents = 0")
    async with appender(db) as writer:
        await writer.append(group(session_id, ev.running(thread_id, "a")))
        with pytest.raises(log.BudgetReached):
            await writer.append(group(session_id, [message(thread_id)], within_budget=True))
        await writer.append(group(session_id, [message(thread_id)]))  # known again, with its budget used up
        await change(db, session_id, "budget_cents = 500, input_seq = 1")
        await writer.append(group(session_id, [message(thread_id)], expect_input_seq=1, within_budget=True))
    assert len(await rows(db, session_id)) == 4


async def test_groups_of_a_session_stay_in_order_where_one_does_not_fit(db: Database) -> None:
    session_id, thread_id = await owned(db)
    async with appender(db) as writer:
        await writer.append(group(session_id, ev.running(thread_id, "a")))
        await change(db, session_id, "input_seq = 1")
        async with anyio.create_task_group() as tasks:
            for number in range(6):
                guard: dict[str, Any] = {"expect_input_seq": 1} if number == 3 else {}
                tasks.start_soon(writer.append, group(session_id, [message(thread_id, str(number))], **guard))
    said = [stored.json()["content"][0]["text"] for stored in (await rows(db, session_id))[2:]]
    assert said == [str(number) for number in range(6)]


async def test_a_known_session_that_is_locked_does_not_hold_up_the_others(db: Database) -> None:
    slow, slow_thread = await owned(db)
    fast, fast_thread = await owned(db)
    async with appender(db) as writer:
        for session_id, thread_id in ((slow, slow_thread), (fast, fast_thread)):
            await writer.append(group(session_id, [message(thread_id)]))
        async with anyio.create_task_group() as tasks, db.transaction() as tx:
            await log.lock(tx, slow)
            tasks.start_soon(writer.append, group(slow, [message(slow_thread)]))
            with anyio.fail_after(3):
                await writer.append(group(fast, [message(fast_thread)]))
            assert len(await rows(db, slow)) == 1
    assert len(await rows(db, slow)) == 2


async def test_a_connection_lost_in_the_statement_is_uncertain_and_the_head_forgotten(db: Database) -> None:
    session_id, thread_id = await owned(db)

    def cut() -> None:
        raise ConnectionResetError

    async with appender(db) as writer:
        await writer.append(group(session_id, [message(thread_id)]))
        faults.arm(log.BEFORE_KNOWN, cut)
        with pytest.raises(AppendUncertain):
            await writer.append(group(session_id, [message(thread_id)]))
        faults.disarm()
        with noted(db) as seen:
            await writer.append(group(session_id, [message(thread_id)]))
        assert len(seen) > 1
    assert [stored.seq for stored in await rows(db, session_id)] == [1, 2]


async def test_an_api_that_writes_between_is_never_written_over(db: Database) -> None:
    """Many appends from both sides at once: no gap, times rise, and the folds are those of the whole log."""
    workspace_id = await sessions.workspace(db)
    targets = [await sessions.session(db, workspace_id, owner="wrk_me", epoch=3) for _ in range(3)]

    async def api(session_id: str, thread_id: str) -> None:
        for number in range(20):
            async with db.transaction() as tx:
                head = await log.lock(tx, session_id)
                assert head is not None
                head.append([message(thread_id, f"api {number}")])
                await log.write(tx, [head])

    async def harness(session_id: str, thread_id: str) -> None:
        for number in range(20):
            start = ev.span_start(thread_id)
            end = ev.span_end(thread_id, start.id, SpanUsage(1, 2), is_error=False, private={"response": {}})
            events = [start, end] if number % 2 else [message(thread_id)]
            await writer.append(group(session_id, events))

    async with appender(db) as writer:
        for session_id, thread_id in targets:
            await writer.append(group(session_id, ev.running(thread_id, "a")))
        async with anyio.create_task_group() as tasks:
            for session_id, thread_id in targets:
                tasks.start_soon(api, session_id, thread_id)
                tasks.start_soon(harness, session_id, thread_id)
    for session_id, _ in targets:
        found = await rows(db, session_id)
        assert [stored.seq for stored in found] == list(range(1, 2 + 20 + 30 + 1))
        stamps = [stored.json()["processed_at"] for stored in found]
        assert stamps == sorted(set(stamps))
        again, thread = SessionState(), ThreadState()
        async with db.transaction() as tx:
            query = text("SELECT type, processed_at FROM events WHERE session_id = :id ORDER BY seq")
            logged = (await tx.execute(query, {"id": session_id})).all()
        for stored in logged:
            spent = SpanUsage(1, 2) if stored.type == "span.model_request_end" else None
            fold.apply(again, thread, stored.type, stored.processed_at, spent)
        assert again == session_state_of(await row(db, "sessions", session_id))
