"""`decide` where calls wait for the client: the matrix of what is open, what has come, and what follows."""

import itertools
from typing import Any

import orjson
import pytest

from managed_agents.eventlog import events as ev
from managed_agents.eventlog.events import NewEvent, QueuedEvent
from managed_agents.harness.decide import GoIdle, Interrupt, RequestModel, Rest, RunTools, Step, TakeAnswers, decide
from managed_agents.harness.permissions import Judgement
from managed_agents.harness.response import Response, events_of
from managed_agents.harness.turn import Turn
from tests.unit.harness.logs import queued, stored

THREAD = "sthr_1"
CUSTOM: dict[str, Any] = {"type": "custom", "name": "weather", "description": "d", "input_schema": {"type": "object"}}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "agent_toolset_20260401",
        "default_config": {"enabled": True, "permission_policy": {"type": "always_allow"}},
        "configs": [
            {"type": "bash", "name": "bash", "enabled": True, "permission_policy": {"type": "always_ask"}},
            {"type": "write", "name": "write", "enabled": True, "permission_policy": {"type": "auto"}},
        ],
    },
    CUSTOM,
]
MESSAGE = queued("user.message", "sevt_m", inbox_seq=7)
INTERRUPT = queued("user.interrupt", "sevt_i", inbox_seq=8)
SYSTEM = queued("system.message", "sevt_s", inbox_seq=9)


class Log:
    """A turn whose model called `names`; knows the calls' event ids."""

    def __init__(self, *names: str, judged: Judgement | None = None) -> None:
        start = ev.span_start(THREAD)
        blocks = [{"type": "tool_use", "id": f"toolu_{i}", "name": name, "input": {}} for i, name in enumerate(names)]
        judgements = {i: judged for i, name in enumerate(names) if name == "write" and judged is not None}
        response = Response(blocks, {}, "m", "tool_use", None, None, {})
        answer = events_of(response, THREAD, start.id, TOOLS, judgements)
        self.events: list[NewEvent] = [*ev.running(THREAD, "a"), queued("user.message", "sevt_0").taken_up(), start, *answer]
        self.calls = [event.id for event in answer if event.type.endswith("tool_use")]

    def add(self, *events: NewEvent) -> "Log":
        self.events += events
        return self

    def idle(self, *waiting: int) -> "Log":
        ids = [self.calls[index] for index in waiting]
        return self.add(*ev.idle(THREAD, "a", {"type": "requires_action", "event_ids": ids}))

    def result(self, index: int) -> "Log":
        return self.add(ev.tool_result(THREAD, self.calls[index], [], is_error=False))

    def custom_result(self, index: int) -> "Log":
        fields = {"custom_tool_use_id": self.calls[index], "content": []}
        return self.add(ev.new_event("user.custom_tool_result", THREAD, fields, tool_use_id=self.calls[index]))

    def confirmation(self, index: int, result: str = "allow", message: str | None = None, *, inbox_seq: int = 5) -> QueuedEvent:
        fields = {"type": "user.tool_confirmation", "id": f"sevt_c{index}", "tool_use_id": self.calls[index], "result": result}
        payload = fields if message is None else {**fields, "deny_message": message}
        return QueuedEvent("sesn_1", inbox_seq, fields["id"], THREAD, fields["type"], orjson.dumps(payload))

    def step(self, *inbox: QueuedEvent) -> Step:
        turn = Turn()
        for event in stored(self.events):
            turn.apply(event)
        return decide(turn, inbox)


def ran(step: Step) -> list[str]:
    assert isinstance(step, RunTools), step
    return [call.event_id for call in step.calls]


def test_allowed_calls_run_before_anybody_is_waited_for() -> None:
    log = Log("bash", "glob", "weather")
    assert ran(log.step()) == [log.calls[1]]
    log.result(1)
    assert log.step() == GoIdle("requires_action", event_ids=(log.calls[0], log.calls[2]))
    log.idle(0, 2)
    assert log.step() == Rest()


def test_a_message_does_not_end_a_wait_but_is_taken_up_after_it() -> None:
    log = Log("weather")
    assert log.step(MESSAGE) == GoIdle("requires_action", event_ids=(log.calls[0],))
    log.idle(0)
    assert log.step(MESSAGE) == Rest()
    log.custom_result(0)
    assert log.step(MESSAGE) == RequestModel((MESSAGE,), opens_period=True)


@pytest.mark.parametrize("idle", [True, False])
def test_confirmations_are_taken_up_at_once_and_open_a_period_where_none_is(idle: bool) -> None:
    log = Log("bash", "bash")
    if idle:
        log.idle(0, 1)
    allow = log.confirmation(1)
    assert log.step(MESSAGE, allow) == TakeAnswers((allow,), opens_period=idle)
    log.add(*(ev.running(THREAD, "a") if idle else []), allow.taken_up())
    assert ran(log.step()) == [log.calls[1]]
    log.result(1)
    assert log.step() == GoIdle("requires_action", event_ids=(log.calls[0],))


@pytest.mark.parametrize(("message", "told"), [(None, ""), ("too late", " Rejection message: too late")])
def test_a_denial_makes_the_call_ready_to_be_refused(message: str | None, told: str) -> None:
    log = Log("bash")
    log.add(log.confirmation(0, "deny", message).taken_up())
    step = log.step()
    assert isinstance(step, RunTools)
    assert step.calls[0].refused == f"Permission to use bash has been rejected.{told}"


def test_of_two_answers_to_one_call_the_first_counts() -> None:
    log = Log("bash")
    log.add(log.confirmation(0).taken_up(), log.confirmation(0, "deny").taken_up())
    step = log.step()
    assert isinstance(step, RunTools)
    assert step.calls[0].refused is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_custom_results_in_any_order_shorten_the_wait_until_the_model_is_asked(order: tuple[int, ...]) -> None:
    log = Log("weather", "weather", "weather").idle(0, 1, 2)
    left = [0, 1, 2]
    for index in order:
        log.custom_result(index)
        left.remove(index)
        if left:
            assert log.step() == GoIdle("requires_action", event_ids=tuple(log.calls[i] for i in left))
            log.idle(*left)
            assert log.step() == Rest()
    assert log.step() == RequestModel((), opens_period=True)


def test_a_repeated_custom_result_asks_nobody() -> None:
    log = Log("weather").custom_result(0)
    start = ev.span_start(THREAD)
    done = Response([{"type": "text", "text": "done"}], {}, "m", "end_turn", None, None, {})
    log.add(start, *events_of(done, THREAD, start.id, TOOLS), *ev.idle(THREAD, "a", {"type": "end_turn"}))
    log.custom_result(0)
    assert log.step() == Rest()
    log.add(*ev.running(THREAD, "a"))
    assert log.step() == GoIdle("end_turn")


@pytest.mark.parametrize("idle", [True, False])
def test_an_interrupt_closes_what_waits_and_takes_the_answers_with_it(idle: bool) -> None:
    log = Log("bash", "weather", "bash")
    if idle:
        log.idle(0, 1, 2)
    allow = log.confirmation(0)
    step = log.step(allow, INTERRUPT)
    assert isinstance(step, Interrupt)
    assert (step.taken, step.ends_turn, step.more) == ((allow, INTERRUPT), True, False)
    assert [call.event_id for call in step.calls] == log.calls


def test_messages_of_a_turn_that_has_begun_wait_behind_its_interrupt() -> None:
    log = Log("bash").idle(0)
    early = queued("user.message", "sevt_e", inbox_seq=3)
    step = log.step(early, INTERRUPT, MESSAGE)
    assert isinstance(step, Interrupt)
    assert (step.taken, step.more) == ((INTERRUPT,), True)


def test_a_system_message_goes_with_what_it_accompanies() -> None:
    log = Log("weather", "weather").idle(0, 1).custom_result(0)
    before = queued("system.message", "sevt_b", inbox_seq=2)
    # Behind an answer: interrupted with it. Behind a message: waits with that.
    step = log.step(before, INTERRUPT, queued("user.message", "sevt_n", inbox_seq=9), SYSTEM)
    assert isinstance(step, Interrupt)
    assert (step.taken, step.more) == ((before, INTERRUPT), True)
    log.custom_result(1)
    assert log.step(before) == RequestModel((before,), opens_period=True)


def test_a_system_message_alone_is_recorded_without_asking_the_model() -> None:
    idle = ev.idle(THREAD, "a", {"type": "end_turn"})
    assert Log("weather").custom_result(0).add(*idle).step(SYSTEM) == GoIdle("end_turn", taken=(SYSTEM,), opens_period=True)


@pytest.mark.parametrize(
    ("judged", "ready", "refused"),
    [
        (Judgement("allow"), True, None),
        (Judgement("deny", "high_risk"), True, "Permission to use write has been denied."),
        (Judgement("deny", "indeterminate"), True, "Permission to use write has been denied."),
        (Judgement("ask", "indeterminate"), False, None),
    ],
)
def test_what_follows_from_a_judgement(judged: Judgement, ready: bool, refused: str | None) -> None:
    log = Log("write", judged=judged)
    step = log.step()
    if ready:
        assert isinstance(step, RunTools)
        assert step.calls[0].refused == refused
    else:
        assert step == GoIdle("requires_action", event_ids=(log.calls[0],))


def test_rounds_go_on_counting_through_a_wait_and_begin_anew_after_the_turn() -> None:
    turn = Turn()
    log = Log("weather").idle(0)
    for event in stored(log.events):
        turn.apply(event)
    assert (turn.rounds, turn.begun, turn.status) == (1, True, "idle")
    log.add(*ev.idle(THREAD, "a", {"type": "end_turn"}))
    turn = Turn()
    for event in stored(log.events):
        turn.apply(event)
    assert (turn.rounds, turn.begun, turn.blocked_on) == (0, False, ())
