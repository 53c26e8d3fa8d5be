"""The seam between the loop and the thinking: `Harness`, and the one that is built.

`decide` and `build_request` are pure, so another harness can replace them without touching log or hands.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from managed_agents.eventlog.events import QueuedEvent
from managed_agents.harness import decide as decisions
from managed_agents.harness import transcript as transcripts
from managed_agents.harness.transcript import Transcript
from managed_agents.harness.turn import Turn


class Harness(Protocol):
    """The pure core of a brain."""

    def decide(self, turn: Turn, inbox: Sequence[QueuedEvent], *, due_in_seconds: float | None, at_cap: bool) -> decisions.Step:
        """Choose the next step; see `decide.py`."""
        ...

    def build_request(
        self,
        agent: dict[str, Any],
        transcript: Transcript,
        *,
        max_tokens: int,
        takes_effort: bool,
        uploads: Sequence[str],
    ) -> dict[str, Any]:
        """Build the next Messages request; see `transcript.py`."""
        ...


class StandardHarness:
    """One model, its tools, one thread."""

    def decide(self, turn: Turn, inbox: Sequence[QueuedEvent], *, due_in_seconds: float | None, at_cap: bool) -> decisions.Step:
        return decisions.decide(turn, inbox, due_in_seconds=due_in_seconds, at_cap=at_cap)

    def build_request(
        self,
        agent: dict[str, Any],
        transcript: Transcript,
        *,
        max_tokens: int,
        takes_effort: bool,
        uploads: Sequence[str],
    ) -> dict[str, Any]:
        return transcripts.build_request(agent, transcript, max_tokens=max_tokens, takes_effort=takes_effort, uploads=uploads)
