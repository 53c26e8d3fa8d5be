"""The seam between the loop and the thinking: `Harness`, and the one that is built.

`decide` and the conversation are pure, so another harness can replace them without touching log or hands. An agent chooses
its harness by metadata (`managed_agents.harness`, read by the claim).
"""

from collections.abc import Sequence
from typing import Any, Protocol

from managed_agents.eventlog.events import QueuedEvent, StoredEvent
from managed_agents.harness import decide as decisions
from managed_agents.harness import transcript as transcripts
from managed_agents.harness.prompt import Brief
from managed_agents.harness.turn import Turn

STANDARD = "standard"  # what agents get that ask for none


class Transcript(Protocol):
    """The conversation as a fold of the log: what the model gets to see, and when that becomes too much."""

    def apply(self, event: StoredEvent) -> None:
        """Add one event of the thread. Called with every event in order, from the log's beginning or a compaction on."""
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
        """What `agent.thread_context_compacted` keeps, from the summarising response; None when that is of no use."""
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
