"""What `decide` needs to know of a thread, folded from its log. Pure.

`Turn.apply()` is fed every event of the thread in order, at start from the table and then from each append; the two give
the same result, so a new owner decides exactly as the old one would have.
"""

from dataclasses import dataclass, field
from typing import Any

from managed_agents.eventlog.events import StoredEvent


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool use of the model without a result yet. `refused` holds the reason when it may not run."""

    event_id: str
    name: str
    input: dict[str, Any]
    refused: str | None = None


@dataclass(slots=True)
class Turn:
    """The state of one thread as of event `seq`."""

    seq: int = 0
    status: str = "idle"
    open_span: str | None = None
    pending: dict[str, ToolCall] = field(default_factory=dict[str, ToolCall])
    # Something stands in the transcript that the model has not seen.
    owes_reply: bool = False
    # Model requests since the session was last idle, and how many of the newest failed in a row.
    rounds: int = 0
    failures: int = 0
    # The streak of failures was already told to clients.
    failure_told: bool = False
    stop_reason: str | None = None
    stop_details: dict[str, Any] | None = None
    # A tool was called since the session was last idle: it may have left outputs.
    called_tools: bool = False
    # The budget stopped the thread in the midst of its turn: it goes on when the session runs again.
    paused: bool = False
    # The model was asked since the session was last idle, however that ended.
    begun: bool = False

    def apply(self, event: StoredEvent) -> None:
        """Fold one event."""
        self.seq = event.seq
        match event.type:
            case "session.status_running":
                self.status = "running"
            case "session.status_rescheduled":
                self.status = "rescheduling"
            case "session.status_terminated":
                self.status = "terminated"
            case "session.thread_status_idle":
                self.paused = event.json()["stop_reason"]["type"] == "budget_reached"
            case "session.status_idle":
                self._idle()
            case "session.error":
                self.failure_told = True
            case "user.message":
                self.owes_reply = self.owes_reply or event.for_model
            case "span.model_request_start":
                self.open_span = event.id
                self.begun = True
                self.rounds += 1
            case "span.model_request_end":
                self._span_end(event)
            case "agent.tool_use":
                body = event.json()
                self.called_tools = True
                self.pending[event.id] = ToolCall(event.id, body["name"], body["input"], event.private_json().get("refused"))
            case "agent.tool_result":
                self.pending.pop(event.json()["tool_use_id"], None)
                self.owes_reply = True
            case _:
                pass

    def _idle(self) -> None:
        self.status = "idle"
        self.begun = False
        self.owes_reply = self.paused
        self.rounds = 0
        self.failures = 0
        self.failure_told = False
        self.stop_reason = None
        self.stop_details = None
        self.called_tools = False

    def _span_end(self, event: StoredEvent) -> None:
        self.open_span = None
        private = event.private_json()
        response = private.get("response")
        if private.get("cut"):
            # By a crash or an interrupt: neither a try that failed nor a round.
            self.rounds -= 1
            return
        if response is None:
            self.failures += 1
            return
        self.failures = 0
        self.failure_told = False
        self.stop_reason = response["stop_reason"]
        self.stop_details = response["stop_details"]
        # The model asked to be called again with what it has said so far.
        self.owes_reply = self.stop_reason == "pause_turn"
