"""The seam between the loop and the thinking: `Harness`, and the one that is built.

`decide` and the conversation are pure, so another harness can replace them without touching log or hands. An agent chooses
its harness by metadata (`managed_agents.harness`, read by the claim). What a harness raises is translated here: an `OSError`
from inside one would otherwise pass for a lost database connection, and be retried for ever.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from managed_agents.eventlog.events import QueuedEvent, StoredEvent
from managed_agents.harness import decide as decisions
from managed_agents.harness import transcript as transcripts
from managed_agents.harness.prompt import Brief
from managed_agents.harness.turn import Turn

STANDARD = "standard"  # what agents get that ask for none


class HarnessFailed(Exception):
    """A harness raised. Whatever it was, it is no trouble of ours that a retry gets rid of."""


class Transcript(Protocol):
    """The conversation as a fold of the log: what the model gets to see, and when that becomes too much."""

    def apply(self, event: StoredEvent) -> None:
        """Add one event of the thread. Called with every event in order, from the log's beginning or a compaction on.

        `processed_at` is missing in one that is about to be appended.
        """
        ...

    def request(self, brief: Brief) -> dict[str, Any]:
        """Build the next Messages request."""
        ...

    def is_full(self, brief: Brief, waiting: Sequence[QueuedEvent]) -> bool:
        """Whether history should be compacted before the next request, which takes up `waiting`."""
        ...

    def compaction(self, brief: Brief, *, briefly: bool) -> dict[str, Any]:
        """Build the Messages request that summarises."""
        ...

    def checkpoint(self, brief: Brief, content: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """What `agent.thread_context_compacted` keeps, from the summarising response; None when that is of no use.

        Not asked about responses that were refused or cut off.
        """
        ...


class Harness(Protocol):
    """The pure core of a brain."""

    def transcript(self) -> Transcript:
        """An empty conversation."""
        ...

    def decide(
        self, turn: Turn, inbox: Sequence[QueuedEvent], *, due_in_seconds: float | None, context_full: bool, at_cap: bool
    ) -> decisions.Step:
        """Choose the next step; see `decide.py`."""
        ...


class StandardHarness:
    """One model, its tools, one thread."""

    def transcript(self) -> transcripts.Transcript:
        return transcripts.Transcript()

    def decide(
        self, turn: Turn, inbox: Sequence[QueuedEvent], *, due_in_seconds: float | None, context_full: bool, at_cap: bool
    ) -> decisions.Step:
        return decisions.decide(turn, inbox, due_in_seconds=due_in_seconds, context_full=context_full, at_cap=at_cap)


class Guarded:
    """A harness whose every failure is `HarnessFailed`."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness

    def transcript(self) -> "GuardedTranscript":
        with _translated("transcript"):
            return GuardedTranscript(self._harness.transcript())

    def decide(
        self, turn: Turn, inbox: Sequence[QueuedEvent], *, due_in_seconds: float | None, context_full: bool, at_cap: bool
    ) -> decisions.Step:
        with _translated("decide"):
            return self._harness.decide(turn, inbox, due_in_seconds=due_in_seconds, context_full=context_full, at_cap=at_cap)


class GuardedTranscript:
    """A conversation whose every failure is `HarnessFailed`."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript

    def apply(self, event: StoredEvent) -> None:
        try:  # spelled out: it runs for every event of a log
            self._transcript.apply(event)
        except Exception as error:
            raise HarnessFailed(f"apply: {type(error).__name__}: {error}") from error

    def request(self, brief: Brief) -> dict[str, Any]:
        with _translated("request"):
            return self._transcript.request(brief)

    def is_full(self, brief: Brief, waiting: Sequence[QueuedEvent]) -> bool:
        with _translated("is_full"):
            return self._transcript.is_full(brief, waiting)

    def compaction(self, brief: Brief, *, briefly: bool) -> dict[str, Any]:
        with _translated("compaction"):
            return self._transcript.compaction(brief, briefly=briefly)

    def checkpoint(self, brief: Brief, content: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        with _translated("checkpoint"):
            return self._transcript.checkpoint(brief, content)


@contextmanager
def _translated(method: str) -> Generator[None]:
    try:
        yield
    except Exception as error:
        raise HarnessFailed(f"{method}: {type(error).__name__}: {error}") from error
