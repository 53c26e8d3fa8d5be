"""`decide`: every step follows from the log and the inbox alone."""

from typing import Any

import orjson
import pytest

from managed_agents.core import limits
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.events import NewEvent, QueuedEvent, SpanUsage
from managed_agents.harness.decide import (
    CloseSpan,
    Compact,
    GoIdle,
    Interrupt,
    Park,
    RequestModel,
    Rest,
    RunTools,
    Step,
    StopExhausted,
    backoff_seconds,
    decide,
    pause_seconds,
)
from managed_agents.harness.response import Response, compacted, events_of
from managed_agents.harness.turn import Turn, restored, snapshot
from tests.unit.harness.logs import queued, stored

THREAD = "sthr_1"
TOOLSET = [
    {
        "type": "agent_toolset_20260401",
        "default_config": {"enabled": True, "permission_policy": {"type": "always_allow"}},
        "configs": [],
    }
]
MESSAGE = queued("user.message", "sevt_m")
INTERRUPT = queued("user.interrupt", "sevt_i")


def turn_of(events: list[NewEvent]) -> Turn:
    turn = Turn()
    for event in stored(events):
        turn.apply(event)
    return turn


def step_after(
    events: list[NewEvent], inbox: list[QueuedEvent] | None = None, due: float | None = None, *, full: bool = False
) -> Step:
    return decide(turn_of(events), inbox or [], due_in_seconds=due, context_full=full)


def answered(start_id: str, *blocks: dict[str, Any], stop: str = "end_turn", **more: Any) -> list[NewEvent]:
    response = Response(list(blocks), {}, "m", stop, more.get("details"), None, more.get("broken", {}), more.get("asked"))
    return events_of(response, THREAD, start_id, TOOLSET)


def opened() -> tuple[list[NewEvent], str]:
    start = ev.span_start(THREAD)
    return [*ev.running(THREAD, "a"), MESSAGE.taken_up(), start], start.id


def bash(provider_id: str = "toolu_1", name: str = "bash") -> dict[str, Any]:
    return {"type": "tool_use", "id": provider_id, "name": name, "input": {"command": "ls"}}


def test_nothing_to_do_rests() -> None:
    assert step_after([]) == Rest()


def test_a_waiting_message_asks_the_model_and_opens_a_period_only_when_none_is_open() -> None:
    assert step_after([], [MESSAGE]) == RequestModel((MESSAGE,), opens_period=True)
    assert step_after(ev.running(THREAD, "a"), [MESSAGE]) == RequestModel((MESSAGE,), opens_period=False)


def test_a_span_left_open_by_a_crash_is_closed_first() -> None:
    events, start_id = opened()
    assert step_after(events, [INTERRUPT]) == CloseSpan(start_id)


def test_after_a_closed_failed_span_the_model_is_asked_again() -> None:
    events, start_id = opened()
    events.append(ev.span_end(THREAD, start_id, SpanUsage(), is_error=True))
    assert step_after(events) == RequestModel((), opens_period=False)


def test_an_answer_without_calls_ends_the_turn() -> None:
    events, start_id = opened()
    assert step_after(events + answered(start_id, {"type": "text", "text": "hi"})) == GoIdle("end_turn")


def test_a_message_sent_in_mid_turn_waits_for_the_results_and_then_steers() -> None:
    events, start_id = opened()
    events += answered(start_id, bash("toolu_1"), bash("toolu_2"), stop="tool_use")
    first = step_after(events, [MESSAGE])
    assert isinstance(first, RunTools)
    assert [call.name for call in first.calls] == ["bash", "bash"]
    events.append(ev.tool_result(THREAD, first.calls[1].event_id, [], is_error=False))
    second = step_after(events, [MESSAGE])
    assert isinstance(second, RunTools)
    assert second.calls == (first.calls[0],)
    events.append(ev.tool_result(THREAD, first.calls[0].event_id, [], is_error=False))
    assert step_after(events, [MESSAGE]) == RequestModel((MESSAGE,), opens_period=False)


@pytest.mark.requirement("EVT-037")
def test_a_tool_that_is_not_enabled_is_refused_and_said_so() -> None:
    events, start_id = opened()
    events += answered(start_id, bash(name="no_such_tool"), stop="tool_use")
    step = step_after(events)
    assert isinstance(step, RunTools)
    assert step.calls[0].refused == "The tool no_such_tool is not enabled in this session."
    body = stored(events)[-2].json()
    assert body["evaluated_permission"] == "deny"
    assert "evaluation" not in body


def test_broken_tool_input_is_an_error_for_the_model() -> None:
    events, start_id = opened()
    events += answered(start_id, {**bash(), "input": {}}, stop="tool_use", broken={0: '{"command": '})
    step = step_after(events)
    assert isinstance(step, RunTools)
    assert "not valid JSON" in (step.calls[0].refused or "")


def test_an_interrupt_closes_pending_calls_and_ends_the_turn() -> None:
    events, start_id = opened()
    events += answered(start_id, bash(), stop="tool_use")
    step = step_after(events, [MESSAGE, INTERRUPT])
    assert isinstance(step, Interrupt)
    assert step.taken == (INTERRUPT,)
    assert len(step.calls) == 1
    assert step.ends_turn


def test_an_interrupt_of_a_period_that_has_not_begun_ends_what_was_sent_before_it() -> None:
    before, interrupt, after = MESSAGE, queued("user.interrupt", "i", inbox_seq=2), queued("user.message", "n", inbox_seq=3)
    step = step_after(ev.running(THREAD, "a"), [before, interrupt, after])
    assert step == Interrupt((before, interrupt), (), ends_turn=True, more=True)
    assert step_after(ev.running(THREAD, "a"), [before, interrupt]) == Interrupt(
        (before, interrupt), (), ends_turn=True, more=False
    )


def test_an_interrupt_of_an_idle_session_ends_nothing() -> None:
    assert step_after([], [INTERRUPT]) == Interrupt((INTERRUPT,), (), ends_turn=False, more=False)


def test_after_an_interrupt_the_queued_message_starts_a_new_turn() -> None:
    events, start_id = opened()
    events += answered(start_id, bash(), stop="tool_use")
    call = step_after(events)
    assert isinstance(call, RunTools)
    events.append(ev.tool_result(THREAD, call.calls[0].event_id, [], is_error=True))
    events += [INTERRUPT.taken_up(), *ev.idle(THREAD, "a", {"type": "end_turn"})]
    assert step_after(events) == Rest()
    assert step_after(events, [MESSAGE]) == RequestModel((MESSAGE,), opens_period=True)


@pytest.mark.requirement("EVT-068")
def test_a_rescheduled_session_waits_for_its_time_but_not_for_an_interrupt() -> None:
    events, start_id = opened()
    events.append(ev.span_end(THREAD, start_id, SpanUsage(), is_error=True))
    events += ev.rescheduled(THREAD, "a")
    assert step_after(events, [MESSAGE], due=2.5) == Park(2.5)
    assert step_after(events, due=-0.1) == RequestModel((), opens_period=True)
    assert step_after(events, [INTERRUPT], due=2.5) == Interrupt((INTERRUPT,), (), ends_turn=True, more=False)


def test_a_refusal_is_told_with_its_details() -> None:
    events, start_id = opened()
    details = {"type": "refusal", "category": "cyber", "explanation": None}
    events += answered(start_id, stop="refusal", details=details)
    assert step_after(events) == GoIdle("refusal", details)


@pytest.mark.requirement("EVT-172")
def test_a_refusal_ends_its_turn_before_anything_that_waits_is_taken_up() -> None:
    events, start_id = opened()
    events += answered(start_id, stop="refusal")
    system = queued("system.message", "sevt_s")
    details = {"type": "refusal", "category": None, "explanation": None}
    assert step_after(events, [system]) == GoIdle("refusal", details, taken=(system,))
    assert step_after(events, [MESSAGE, system], full=True) == GoIdle("refusal", details, more=True)
    events += [*ev.idle(THREAD, "a", {"type": "refusal"}, details), *ev.running(THREAD, "a")]
    assert step_after(events, [MESSAGE, system]) == RequestModel((MESSAGE, system), opens_period=False)


def test_what_an_older_log_took_up_behind_a_refusal_is_answered() -> None:
    events, start_id = opened()
    events += answered(start_id, stop="refusal")
    start = ev.span_start(THREAD)
    events += [queued("user.message", "sevt_n").taken_up(), start, ev.span_end(THREAD, start.id, SpanUsage(), is_error=True)]
    assert step_after(events) == RequestModel((), opens_period=False)


@pytest.mark.requirement("EVT-150")
def test_of_a_refusal_only_what_the_api_has_names_for_is_told() -> None:
    events, start_id = opened()
    events += answered(start_id, stop="refusal", details={"category": "weird", "explanation": 5, "more": 1})
    assert step_after(events) == GoIdle("refusal", {"type": "refusal", "category": None, "explanation": None})


def test_a_paused_response_is_continued() -> None:
    events, start_id = opened()
    events += answered(start_id, {"type": "text", "text": "…"}, stop="pause_turn")
    assert step_after(events) == RequestModel((), opens_period=False)


def test_pauses_in_a_row_are_bounded_wait_longer_and_longer_and_any_other_answer_ends_the_row() -> None:
    events, start_id = opened()
    for n in range(limits.PAUSES_IN_A_ROW_MAX + 1):
        assert not isinstance(step_after(events), StopExhausted)
        if n:
            start = ev.span_start(THREAD)
            start_id = start.id
            events.append(start)
        events += answered(start_id, {"type": "text", "text": "…"}, stop="pause_turn")
    stop = step_after(events)
    assert isinstance(stop, StopExhausted)
    assert stop.error_type == "model_request_failed_error"
    start = ev.span_start(THREAD)
    ended = [*events, start, *answered(start.id, {"type": "text", "text": "."})]
    assert step_after(ended) == GoIdle("end_turn")
    assert [pause_seconds(n, 0.0) for n in range(6)] == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0]


@pytest.mark.requirement("EVT-047")
def test_the_round_limit_stops_a_turn_and_a_new_message_starts_afresh() -> None:
    events, start_id = opened()
    for _ in range(limits.TOOL_ROUNDS_PER_TURN_MAX):
        events += answered(start_id, bash(), stop="tool_use")
        events.append(ev.tool_result(THREAD, events[-2].id, [], is_error=False))
        start = ev.span_start(THREAD)
        start_id = start.id
        events.append(start)
    events.pop()
    step = step_after(events)
    assert isinstance(step, StopExhausted)
    assert step.error_type == "tool_use_limit_reached_error"
    events += ev.idle(THREAD, "a", {"type": "retries_exhausted"})
    assert step_after(events) == Rest()
    assert step_after(events, [MESSAGE]) == RequestModel((MESSAGE,), opens_period=True)


def test_flushed_messages_do_not_start_anything() -> None:
    events = [MESSAGE.taken_up(for_model=False), *ev.idle(THREAD, "a", {"type": "retries_exhausted"})]
    assert step_after(events) == Rest()


@pytest.mark.requirement("SES-040")
def test_a_terminated_session_rests_whatever_waits() -> None:
    assert step_after(ev.terminated(THREAD, "a"), [MESSAGE]) == Rest()


def test_backoff_doubles_is_capped_and_respects_retry_after() -> None:
    assert [backoff_seconds(n, 0.0, None) for n in (1, 2, 3)] == [1.0, 2.0, 4.0]
    assert backoff_seconds(20, 0.0, None) == limits.MODEL_BACKOFF_MAX_SECONDS
    assert backoff_seconds(1, 1.0, None) == 1.25
    assert backoff_seconds(1, 0.0, 7.0) == 7.0
    assert backoff_seconds(1, 0.0, 300.0) == 300.0
    assert backoff_seconds(1, 0.0, 1e9) == limits.MODEL_RETRY_AFTER_MAX_SECONDS


def test_a_full_context_is_compacted_before_the_model_is_asked_but_not_without_work() -> None:
    assert step_after([], full=True) == Rest()
    assert step_after([], [MESSAGE], full=True) == Compact(opens_period=True, briefly=False)
    events, start_id = opened()
    events += answered(start_id, bash(), stop="tool_use")
    assert isinstance(step_after(events, full=True), RunTools)


def compaction(*, useful: bool) -> list[NewEvent]:
    response = Response([], {}, "m", "end_turn", None, None, {})
    start = ev.span_start(THREAD)
    return [start, *compacted(response, THREAD, start.id, {"summary": "s", "kept": [], "turn": {}} if useful else None)]


def test_an_interrupt_of_a_compaction_ends_what_asked_for_the_turn_too() -> None:
    before, interrupt = MESSAGE, queued("user.interrupt", "i", inbox_seq=2)
    start = ev.span_start(THREAD)
    events = [*ev.running(THREAD, "a"), start, ev.span_end(THREAD, start.id, SpanUsage(), is_error=True, private={"cut": True})]
    assert step_after(events, [before, interrupt]) == Interrupt((before, interrupt), (), ends_turn=True, more=False)


def test_too_many_compactions_in_a_row_give_the_turn_up() -> None:
    events, start_id = opened()
    events.append(ev.span_end(THREAD, start_id, SpanUsage(), is_error=True, private={"too_long": True}))
    assert step_after(events) == Compact(opens_period=False, briefly=True)
    events += compaction(useful=True)
    assert step_after(events) == RequestModel((), opens_period=False)
    assert step_after(events, full=True) == Compact(opens_period=False, briefly=False)
    events += compaction(useful=False)
    assert step_after(events, full=True) == Compact(opens_period=False, briefly=True)
    events += compaction(useful=True)
    step = step_after(events, [MESSAGE], full=True)
    assert isinstance(step, StopExhausted)
    assert (step.error_type, step.flushed) == ("compaction_limit_reached_error", (MESSAGE,))
    # A message or a call of the model begins a new count.
    start = ev.span_start(THREAD)
    events += [start, *answered(start.id, {"type": "text", "text": "Hm."}, bash(), stop="tool_use")]
    events.append(ev.tool_result(THREAD, events[-2].id, [], is_error=False))
    assert step_after(events, full=True) == Compact(opens_period=False, briefly=False)


def test_a_compaction_that_does_not_fit_either_counts_as_one() -> None:
    events, start_id = opened()
    events.append(ev.span_end(THREAD, start_id, SpanUsage(), is_error=True, private={"too_long": True}))
    for _ in range(limits.COMPACTIONS_IN_A_ROW_MAX):
        assert step_after(events) == Compact(opens_period=False, briefly=True)
        start = ev.span_start(THREAD)
        private = {"too_long": True, "compaction": {"useful": False}}
        events += [start, ev.span_end(THREAD, start.id, SpanUsage(), is_error=True, private=private)]
    step = step_after(events, [MESSAGE])
    assert isinstance(step, StopExhausted)
    assert (step.error_type, step.flushed) == ("compaction_limit_reached_error", (MESSAGE,))


def test_a_response_cut_off_at_its_limit_is_continued_a_few_times() -> None:
    events, start_id = opened()
    for _ in range(limits.CONTINUATIONS_IN_A_ROW_MAX):
        events += answered(start_id, {"type": "text", "text": "and"}, stop="max_tokens")
        assert step_after(events) == RequestModel((), opens_period=False)
        start = ev.span_start(THREAD)
        start_id = start.id
        events.append(start)
    events += answered(start_id, {"type": "text", "text": "so on"}, stop="max_tokens")
    assert step_after(events) == GoIdle("end_turn")


def test_a_response_that_filled_the_context_is_continued_behind_a_compaction() -> None:
    events, start_id = opened()
    events += answered(start_id, {"type": "text", "text": "and"}, stop="model_context_window_exceeded")
    assert step_after(events) == Compact(opens_period=False, briefly=True)


def test_a_turn_survives_its_checkpoint() -> None:
    events, start_id = opened()
    events += answered(start_id, bash(), stop="tool_use")
    turn = turn_of(events)
    assert restored(orjson.loads(orjson.dumps(snapshot(turn))), seq=turn.seq) == turn
    assert restored({"status": "running", "a field of the future": 1}, seq=7) == Turn(seq=7, status="running")
