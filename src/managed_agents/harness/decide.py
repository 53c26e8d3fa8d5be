"""What to do next, from what the log and the inbox say. Pure; matched exhaustively by the loop.

There is no recovery path: after a crash another worker folds the same log and gets the same step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from managed_agents.core import limits
from managed_agents.eventlog.events import TOOL_CONFIRMATION, QueuedEvent
from managed_agents.harness.turn import ToolCall, Turn

# spec: the values of `category` in beta_managed_agents_session_refusal_stop_details.py
REFUSAL_CATEGORIES = ("cyber", "bio", "frontier_llm", "reasoning_extraction", "general_harms")


@dataclass(frozen=True, slots=True)
class CloseSpan:
    """A model request was cut off by a crash: close it, silently."""

    start_id: str


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Close what is open with an error result, log what is taken, and go idle where a turn was running.

    `more` says that messages wait behind the interrupts: they begin a new turn.
    """

    taken: tuple[QueuedEvent, ...]
    calls: tuple[ToolCall, ...]
    ends_turn: bool
    more: bool


@dataclass(frozen=True, slots=True)
class TakeAnswers:
    """Log what the client decided about calls. `opens_period`: the session is not running yet."""

    taken: tuple[QueuedEvent, ...]
    opens_period: bool


@dataclass(frozen=True, slots=True)
class RunTools:
    """Run these calls, those that run already included; the results decide what follows."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class RequestModel:
    """Take up the waiting messages and ask the model. `opens_period`: the session is not running yet."""

    taken: tuple[QueuedEvent, ...]
    opens_period: bool


@dataclass(frozen=True, slots=True)
class Compact:
    """Ask the model for a summary of the history first. `briefly`: the history itself did not fit, or did not do."""

    opens_period: bool
    briefly: bool


@dataclass(frozen=True, slots=True)
class GoIdle:
    """The turn is over, cannot go on before the client has answered `event_ids`, or not before the budget is raised.

    `taken` is what was sent for later turns; `opens_period` says that a running period has to be shown first. `of_session` is
    the session's reason where it is not the thread's. `more` says that messages wait: they begin a new turn.
    """

    stop_reason: str
    stop_details: dict[str, Any] | None = None
    event_ids: tuple[str, ...] = ()
    taken: tuple[QueuedEvent, ...] = ()
    opens_period: bool = False
    of_session: str | None = None
    more: bool = False


@dataclass(frozen=True, slots=True)
class StopExhausted:
    """The turn cannot go on (`error_type` says why): tell it, flush the queue, go idle."""

    error_type: str
    message: str
    flushed: tuple[QueuedEvent, ...]


@dataclass(frozen=True, slots=True)
class Park:
    """Nothing to do before this many seconds have passed."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing to do at all."""


Step = CloseSpan | Interrupt | TakeAnswers | RunTools | RequestModel | Compact | GoIdle | StopExhausted | Park | Rest


def decide(
    turn: Turn,
    inbox: Sequence[QueuedEvent],
    *,
    due_in_seconds: float | None = None,
    context_full: bool = False,
    at_cap: bool = False,
) -> Step:
    """Choose the next step of a thread.

    `inbox` holds everything that waits, oldest first; `due_in_seconds` is set while a retry is scheduled in the future;
    `context_full` says that the next request would hardly fit into the model's context; `at_cap` that an append of the last
    decision was refused because the budget is used up.
    """
    if turn.status == "terminated":
        return Rest()
    if turn.open_span is not None:
        return CloseSpan(turn.open_span)
    if interrupts := tuple(event for event in inbox if event.type == "user.interrupt"):
        taken = _with_interrupts(turn, inbox, last=interrupts[-1].inbox_seq)
        ends_turn = turn.status != "idle" or bool(turn.blocked_on)
        return Interrupt(taken, tuple(turn.pending.values()), ends_turn=ends_turn, more=len(taken) < len(inbox))
    if due_in_seconds is not None and due_in_seconds > 0 and turn.status == "rescheduling":
        return Park(due_in_seconds)
    if answers := tuple(event for event in inbox if event.type == TOOL_CONFIRMATION):
        return TakeAnswers(answers, opens_period=turn.status != "running")
    if ready := tuple(call for call in turn.pending.values() if call.awaits is None):
        return RunTools(ready)
    if turn.pending:
        waiting = tuple(turn.pending)
        if turn.status == "idle" and turn.blocked_on == waiting:
            return Rest()
        return GoIdle("requires_action", event_ids=waiting)
    messages = tuple(event for event in inbox if event.type in ("user.message", "system.message"))
    asked = any(event.type == "user.message" for event in messages)
    if turn.stop_reason == "refusal" and not turn.owes_reply:
        # Before anything else is taken up: the refusal is this turn's end, whatever waits for the next one.
        details = _refusal_details(turn.stop_details or {})
        return GoIdle("refusal", details, taken=() if asked else messages, more=asked)
    if turn.owes_reply or asked:
        if at_cap:
            return GoIdle("budget_reached", taken=messages, opens_period=turn.status == "idle")
        if turn.rounds >= limits.TOOL_ROUNDS_PER_TURN_MAX + turn.failures:
            return StopExhausted(
                "tool_use_limit_reached_error",
                f"The turn reached its limit of {limits.TOOL_ROUNDS_PER_TURN_MAX} model requests.",
                messages,
            )
        if turn.pauses > limits.PAUSES_IN_A_ROW_MAX:
            return StopExhausted(
                "model_request_failed_error",
                f"The model paused its response {turn.pauses} times in a row and did not come to an end.",
                messages,
            )
        if context_full or turn.too_long:
            return _compact(turn, messages)
        return RequestModel(messages, opens_period=turn.status != "running")
    if turn.status == "idle" and not messages:
        return Rest()
    # The request that crossed the cap has finished the turn: the thread is done, the session accepts nothing more.
    of_session = "budget_reached" if at_cap else None
    return GoIdle("end_turn", taken=messages, opens_period=turn.status == "idle", of_session=of_session)


def _refusal_details(told: Mapping[str, Any]) -> dict[str, Any]:
    """What clients are told of a refusal: what the API has a name for, whatever the endpoint said."""
    category, explanation = told.get("category"), told.get("explanation")
    return {
        "type": "refusal",
        "category": category if category in REFUSAL_CATEGORIES else None,
        "explanation": explanation if isinstance(explanation, str) else None,
    }


def _with_interrupts(turn: Turn, inbox: Sequence[QueuedEvent], *, last: int) -> tuple[QueuedEvent, ...]:
    """What is taken up together with the interrupts; the newest of them is number `last`.

    Behind a turn that has begun, messages wait for the next one. A period that was opened but has not taken anything up
    yet is about what was sent before the interrupt: that is taken, as it would have been had we been faster. Answers to
    calls that the interrupt closes are history; a system message goes with what it accompanies.
    """
    fresh = turn.status == "running" and not turn.begun
    taken: list[QueuedEvent] = []
    left = False
    for event in inbox:
        about_this_turn = event.type in ("user.interrupt", TOOL_CONFIRMATION) or (fresh and event.inbox_seq < last)
        if about_this_turn or (event.type == "system.message" and not left):
            taken.append(event)
        else:
            left = True
    return tuple(taken)


def _compact(turn: Turn, messages: tuple[QueuedEvent, ...]) -> Step:
    if turn.compactions >= limits.COMPACTIONS_IN_A_ROW_MAX:
        return StopExhausted(
            "compaction_limit_reached_error",
            f"The context is full again after {limits.COMPACTIONS_IN_A_ROW_MAX} compactions in a row.",
            messages,
        )
    return Compact(opens_period=turn.status != "running", briefly=turn.too_long or turn.compaction_failed)


def backoff_seconds(failures: int, jitter: float, retry_after: float | None) -> float:
    """Wait before try number `failures + 1`: doubling from one second, capped, plus up to a quarter of `jitter` (0 to 1).

    A server's `retry_after` is a lower bound with a cap of its own: a parked session costs nothing, and a try before its time
    is a try lost.
    """
    doubled = min(limits.MODEL_BACKOFF_MAX_SECONDS, limits.MODEL_BACKOFF_FIRST_SECONDS * 2 ** (failures - 1))
    asked = min(limits.MODEL_RETRY_AFTER_MAX_SECONDS, retry_after or 0.0)
    return max(doubled, asked) * (1 + jitter / 4)


def pause_seconds(pauses: int, jitter: float) -> float:
    """Wait before a response that was paused `pauses` times in a row is continued: the first time not at all."""
    return backoff_seconds(pauses - 1, jitter, None) if pauses > 1 else 0.0
