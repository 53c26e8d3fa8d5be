"""A second harness, to prove the seam: the model sees the newest message only, in capitals, and gets no tools."""

from collections.abc import Sequence
from typing import Any

from managed_agents.eventlog.events import QueuedEvent, StoredEvent
from managed_agents.harness.decide import GoIdle, Interrupt, RequestModel, Rest, Step
from managed_agents.harness.prompt import Brief
from managed_agents.harness.turn import Turn


class LastWords:
    """A conversation without a past."""

    def __init__(self) -> None:
        self._said = ""

    def apply(self, event: StoredEvent) -> None:
        if event.type == "user.message" and event.for_model:
            self._said = event.json()["content"][0]["text"].upper()

    def request(self, brief: Brief) -> dict[str, Any]:
        agent = brief.agent
        said = [{"role": "user", "content": self._said}]
        return {"model": agent["model"]["id"], "max_tokens": 1000, "system": agent["system"], "messages": said}

    def is_full(self, brief: Brief, waiting: Sequence[QueuedEvent]) -> bool:
        return False

    def compaction(self, brief: Brief, *, briefly: bool) -> dict[str, Any]:
        raise AssertionError("it is never full")

    def checkpoint(self, brief: Brief, content: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        raise AssertionError("it is never full")


class TinyHarness:
    """One request for each batch of messages, whatever comes of it."""

    def transcript(self) -> LastWords:
        return LastWords()

    def decide(
        self, turn: Turn, inbox: Sequence[QueuedEvent], *, due_in_seconds: float | None, context_full: bool, at_cap: bool
    ) -> Step:
        if interrupts := tuple(event for event in inbox if event.type == "user.interrupt"):
            return Interrupt(interrupts, (), ends_turn=turn.status != "idle", more=len(inbox) > len(interrupts))
        if messages := tuple(event for event in inbox if event.type == "user.message"):
            return RequestModel(messages, opens_period=turn.status != "running")
        return Rest() if turn.status == "idle" else GoIdle("end_turn")
