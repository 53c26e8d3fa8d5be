"""A harness with bugs that a test turns on and off, by name of the method that raises."""

from collections.abc import Callable, Sequence
from typing import Any

from managed_agents.eventlog.events import QueuedEvent, StoredEvent
from managed_agents.harness.brain import StandardHarness
from managed_agents.harness.decide import Step
from managed_agents.harness.transcript import Transcript
from managed_agents.harness.turn import Turn


class Bugs:
    """What raises, how often it did, and how often it still will."""

    def __init__(self) -> None:
        self.wrong: dict[str, Callable[[Any], bool]] = {}
        self.error: type[Exception] = KeyError
        self.raised = 0
        self.left: int | None = None

    def reach(self, method: str, value: Any) -> None:
        """Raise where the test wants it."""
        if self.left != 0 and (wrong := self.wrong.get(method)) is not None and wrong(value):
            self.raised += 1
            self.left = None if self.left is None else self.left - 1
            raise self.error("a bug")


class FailingTranscript(Transcript):
    """The standard conversation, with bugs."""

    bugs: Bugs

    def apply(self, event: StoredEvent) -> None:
        self.bugs.reach("apply", event)
        super().apply(event)


class FailingHarness(StandardHarness):
    """The standard harness, with bugs."""

    def __init__(self, bugs: Bugs) -> None:
        self._bugs = bugs

    def transcript(self) -> FailingTranscript:
        self._bugs.reach("transcript", None)
        made = FailingTranscript()
        made.bugs = self._bugs
        return made

    def decide(
        self, turn: Turn, inbox: Sequence[QueuedEvent], *, due_in_seconds: float | None, context_full: bool, at_cap: bool
    ) -> Step:
        self._bugs.reach("decide", turn)
        return super().decide(turn, inbox, due_in_seconds=due_in_seconds, context_full=context_full, at_cap=at_cap)
