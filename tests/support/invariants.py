"""What holds for every session's log, whatever happened to the processes that wrote it."""

import re
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import orjson
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.eventlog import fold
from managed_agents.eventlog.append import session_state_of
from managed_agents.eventlog.events import SpanUsage
from managed_agents.eventlog.fold import SessionState, ThreadState

Event = dict[str, Any]
_ID = re.compile(r"(sevt|sthr|sesn|sbx)_[0-9A-Za-z]+")
# Figures that depend on time, and on what the model's prompt cache had seen.
_USES = ("agent.tool_use", "agent.custom_tool_use")
_MEASURED = ("processed_at", "usage", "model_usage")


def check_history(events: Sequence[Event], *, at_rest: bool = True) -> None:
    """Check a history as clients see it, oldest first and complete."""
    ids = [event["id"] for event in events]
    assert len(set(ids)) == len(ids), "an event stands twice in the history"
    assert all(event["processed_at"] for event in events), "something still waits to be processed"
    # Not as text: the SDK leaves a fraction of nought out.
    times = [datetime.fromisoformat(event["processed_at"]) for event in events]
    assert all(before < after for before, after in pairwise(times)), "processed_at strictly rises"
    _check_spans(events)
    _check_tools(events)
    _check_statuses(events)
    if at_rest:
        assert events[-1]["type"] == "session.status_idle", f"the history ends with {events[-1]['type']}"
        assert not _open_spans(events), "a model request was never closed"
        assert not _open_calls(events), "a tool use has no result"


def _check_spans(events: Sequence[Event]) -> None:
    started, ended, running = set[str](), set[str](), None
    for event in events:
        if event["type"] == "span.model_request_start":
            assert running is None, "a model request began while another one was open"
            running = event["id"]
            started.add(running)
        elif event["type"] == "span.model_request_end":
            start_id = event["model_request_start_id"]
            assert start_id in started, "a model request ended that never began"
            assert start_id not in ended, "a model request ended twice"
            ended.add(start_id)
            running = None


def _check_tools(events: Sequence[Event]) -> None:
    uses, results = set[str](), set[str]()
    for event in events:
        if event["type"] in _USES:
            uses.add(event["id"])
        elif event["type"] == "user.custom_tool_result":
            # The first answer counts; it may be repeated.
            assert event["custom_tool_use_id"] in uses, "an answer without its call"
            results.add(event["custom_tool_use_id"])
        elif event["type"] == "agent.tool_result":
            assert event["tool_use_id"] in uses, "a result without its tool use"
            assert event["tool_use_id"] not in results, "a tool use has two results"
            results.add(event["tool_use_id"])
        elif event["type"] == "span.model_request_start":
            assert uses == results, "the model was asked while a tool use had no result"


def _check_statuses(events: Sequence[Event]) -> None:
    """Session and thread change status in pairs, and never to the status they have."""
    session = thread = "idle"
    waiting: dict[str, list[str]] = {"session.": [], "session.thread_": []}
    for event in events:
        kind, _, status = event["type"].rpartition("status_")
        if kind in waiting and status == "idle":
            left = event["stop_reason"].get("event_ids", [])
            was = session if kind == "session." else thread
            # A wait may become shorter, or end by an interrupt, without a running period between.
            assert was != "idle" or set(left) < set(waiting[kind]), f"{kind} was idle already"
            waiting[kind] = left
        if kind == "session.":
            assert status != session or status in ("rescheduled", "idle"), f"session was {session} already"
            session = status
        elif kind == "session.thread_":
            assert status != thread or status in ("rescheduled", "idle"), f"thread was {thread} already"
            thread = status
        elif event["type"] == "agent.tool_result" and waiting["session."] and session == "idle":
            # What an interrupt closes that nothing ran for.
            assert event["is_error"]
        elif event["type"].startswith(("agent.", "span.model_request_start")):
            assert session == "running", f"{event['type']} while the session was {session}"
    assert session == thread


def _open_spans(events: Sequence[Event]) -> set[str]:
    ends = {event["model_request_start_id"] for event in events if event["type"] == "span.model_request_end"}
    return {event["id"] for event in events if event["type"] == "span.model_request_start"} - ends


def _open_calls(events: Sequence[Event]) -> set[str]:
    """Calls without a result, except those the session says it waits for."""
    results = {event["tool_use_id"] for event in events if event["type"] == "agent.tool_result"}
    results |= {event["custom_tool_use_id"] for event in events if event["type"] == "user.custom_tool_result"}
    idles = [event["stop_reason"] for event in events if event["type"] == "session.status_idle"]
    waiting = set(idles[-1].get("event_ids", [])) if idles else set()
    return {event["id"] for event in events if event["type"] in _USES} - results - waiting


async def check_rows(db: Database, session_id: str, listed: Sequence[Event], *, at_rest: bool = True) -> None:
    """Check a session's rows: no gaps, the history is exactly the table, and the folded columns are the fold of the log."""
    async with db.transaction() as tx:
        rows = (
            await tx.execute(
                text(
                    "SELECT seq, id, type, processed_at, tool_use_id, body, private FROM events "
                    "WHERE session_id = :id ORDER BY seq"
                ),
                {"id": session_id},
            )
        ).all()
        session = (await tx.execute(text("SELECT * FROM sessions WHERE id = :id"), {"id": session_id})).one()
        waiting = (await tx.execute(text("SELECT count(*) FROM inbox WHERE session_id = :id"), {"id": session_id})).scalar_one()
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1)), "seq has a gap"
    assert session.last_seq == len(rows)
    assert session.inbox_count == waiting
    bodies = [orjson.loads(row.body) for row in rows]
    assert [body["id"] for body in bodies] == [event["id"] for event in listed], "the history is not the table"
    if at_rest:
        assert waiting == 0
        assert session.owner is None
        assert session.handled_seq == session.input_seq
    state, thread = SessionState(), ThreadState()
    for row in rows:
        private = orjson.loads(row.private) if row.private is not None else {}
        usage = SpanUsage.from_json(private["usage"]) if "usage" in private else None
        fold.apply(state, thread, row.type, row.processed_at, usage)
        fold.apply_call(state, row.type, row.id, row.tool_use_id, _awaited(orjson.loads(row.body)))
    stored = session_state_of(session)
    assert (state.status, state.requests, state.totals) == (stored.status, stored.requests, stored.totals)
    assert list(state.waiting.items()) == list(stored.waiting.items())
    assert abs(state.active.seconds - stored.active.seconds) < 1e-6


def _awaited(body: Event) -> str | None:
    if body["type"] == "agent.custom_tool_use":
        return "user.custom_tool_result"
    return "user.tool_confirmation" if body.get("evaluated_permission") == "ask" else None


def normalised(events: Sequence[Event]) -> list[Event]:
    """A history without what differs between two runs of one script: ids, times, figures, model requests cut off by a crash.

    Results of calls that ran side by side are put in the order of their tool uses.
    """
    cut = {event["model_request_start_id"] for event in events if event["type"] == "span.model_request_end" and event["is_error"]}
    kept = [event for event in events if event["id"] not in cut and event.get("model_request_start_id") not in cut]
    kept = _results_in_order(kept)
    names: dict[str, str] = {}
    return [_renamed({key: value for key, value in event.items() if key not in _MEASURED}, names) for event in kept]


def _results_in_order(events: Sequence[Event]) -> list[Event]:
    position = {event["id"]: index for index, event in enumerate(events)}
    ordered: list[Event] = []
    run: list[Event] = []
    for event in [*events, None]:
        if event is not None and event["type"] == "agent.tool_result":
            run.append(event)
            continue
        ordered += sorted(run, key=lambda result: position[result["tool_use_id"]])
        run = []
        if event is not None:
            ordered.append(event)
    return ordered


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, names) for inner in value]
    if isinstance(value, str) and _ID.fullmatch(value):
        return names.setdefault(value, f"{value.partition('_')[0]} {len(names)}")
    return value
