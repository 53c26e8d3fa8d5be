"""What to do next, from what the log and the inbox say. Pure; matched exhaustively by the loop.

There is no recovery path: after a crash another worker folds the same log and gets the same step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from managed_agents.core import limits
from managed_agents.eventlog.events import QueuedEvent
from managed_agents.harness.turn import ToolCall, Turn


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
class RunTools:
    """Run these calls; the results decide what follows."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class RequestModel:
    """Take up the waiting messages and ask the model. `opens_period`: the session is not running yet."""

    taken: tuple[QueuedEvent, ...]
    opens_period: bool


@dataclass(frozen=True, slots=True)
class GoIdle:
    """The turn is over. `of_session` is the session's reason where it is not the thread's."""

    stop_reason: str
    stop_details: dict[str, Any] | None = None
    of_session: str | None = None


@dataclass(frozen=True, slots=True)
class PauseAtCap:
    """The budget lets no further model request begin: take up what waits, and go idle until it is raised."""

    taken: tuple[QueuedEvent, ...]


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


Step = CloseSpan | Interrupt | RunTools | RequestModel | PauseAtCap | GoIdle | StopExhausted | Park | Rest


def decide(turn: Turn, inbox: Sequence[QueuedEvent], *, due_in_seconds: float | None = None, at_cap: bool = False) -> Step:
    """Choose the next step of a thread.

    `inbox` holds everything that waits, oldest first; `due_in_seconds` is set while a retry is scheduled in the future. `at_cap`:
    an append of the last decision was refused because the budget is used up.
    """
    if turn.status == "terminated":
        return Rest()
    if turn.open_span is not None:
        return CloseSpan(turn.open_span)
    if interrupts := tuple(event for event in inbox if event.type == "user.interrupt"):
        # A period that was opened but has not taken anything up yet: what was sent before the interrupt is what it is
        # about, as it would be had we been faster. Behind a turn that has begun, messages wait for the next one.
        fresh = turn.status == "running" and not turn.begun
        taken = tuple(event for event in inbox if event in interrupts or (fresh and event.inbox_seq < interrupts[-1].inbox_seq))
        more = len(taken) < len(inbox)
        return Interrupt(taken, tuple(turn.pending.values()), ends_turn=turn.status != "idle", more=more)
    if due_in_seconds is not None and due_in_seconds > 0 and turn.status == "rescheduling":
        return Park(due_in_seconds)
    if turn.pending:
        return RunTools(tuple(turn.pending.values()))
    messages = tuple(event for event in inbox if event.type == "user.message")
    if messages or turn.owes_reply:
        if at_cap:
            return PauseAtCap(messages)
        if turn.rounds >= limits.TOOL_ROUNDS_PER_TURN_MAX + turn.failures:
            return StopExhausted(
                "tool_use_limit_reached_error",
                f"The turn reached its limit of {limits.TOOL_ROUNDS_PER_TURN_MAX} model requests.",
                messages,
            )
        return RequestModel(messages, opens_period=turn.status != "running")
    if turn.status == "idle":
        return Rest()
    if turn.stop_reason == "refusal":
        return GoIdle("refusal", turn.stop_details or {"type": "refusal", "category": None, "explanation": None})
    # The request that crossed the cap has finished the turn: the thread is done, the session accepts nothing more.
    return GoIdle("end_turn", of_session="budget_reached" if at_cap else None)


def backoff_seconds(failures: int, jitter: float, retry_after: float | None) -> float:
    """Wait before try number `failures + 1`: doubling from one second, capped, plus up to a quarter of `jitter` (0 to 1).

    A server's `retry_after` is a lower bound, itself capped.
    """
    doubled = limits.MODEL_BACKOFF_FIRST_SECONDS * 2 ** (failures - 1)
    wait = min(limits.MODEL_BACKOFF_MAX_SECONDS, max(doubled, retry_after or 0.0))
    return wait * (1 + jitter / 4)
