"""What `decide` needs to know of a thread, folded from its log. Pure.

`Turn.apply()` is fed every event of the thread in order, at start from the table and then from each append; the two give
the same result, so a new owner decides exactly as the old one would have.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from managed_agents.core import limits
from managed_agents.eventlog.events import CUSTOM_TOOL_RESULT, TOOL_CONFIRMATION, StoredEvent


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool use of the model without a result yet.

    `refused` holds the reason when it may not run; `awaits` the type of the client's event it cannot go on without.
    """

    event_id: str
    name: str
    input: dict[str, Any]
    refused: str | None = None
    awaits: str | None = None


def rejection(name: str, deny_message: str | None) -> str:
    """What the model is told of a call that the client denied."""
    told = f"Permission to use {name} has been rejected."  # observed
    return f"{told} Rejection message: {deny_message}" if deny_message else told


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
    # The model was asked about something that was taken up since the session was last idle, however that ended.
    begun: bool = False
    # Responses in a row that were cut off at an output limit and have to be continued.
    continuations: int = 0
    # Responses in a row that the endpoint paused, to be called again with what it has said so far.
    pauses: int = 0
    # Summaries in a row without a message or a tool call of the model, and whether the newest was of no use.
    compactions: int = 0
    compaction_failed: bool = False
    # The model refused the newest request because of its size.
    too_long: bool = False
    # The calls that the newest idle event named as waiting for the client. Such an idle does not end the turn.
    blocked_on: tuple[str, ...] = ()

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
                self._idle(event.json()["stop_reason"])
            case "session.error":
                # Neither a repository that cannot be cloned nor what is said while calls are pending is a failure of the model's.
                if not self.pending and not event.json()["error"]["type"].startswith("repository_"):
                    self.failure_told = True
            case "user.message":
                self.owes_reply = self.owes_reply or event.for_model
            case "span.model_request_start":
                self.open_span = event.id
                # A compaction may come before anything is taken up.
                self.begun = self.begun or self.owes_reply
                self.rounds += 1
            case "span.model_request_end":
                self._span_end(event)
            case "agent.thread_context_compacted":
                self.compactions += 1
                self.compaction_failed = False
                self.too_long = False
            case "agent.message":
                self.compactions = 0
            case "agent.tool_use":
                body = event.json()
                self.called_tools = True
                self.compactions = 0
                refused = event.private_json().get("refused")
                awaits = TOOL_CONFIRMATION if body["evaluated_permission"] == "ask" else None
                self.pending[event.id] = ToolCall(event.id, body["name"], body["input"], refused, awaits)
            case "agent.custom_tool_use":
                body = event.json()
                self.compactions = 0
                self.pending[event.id] = ToolCall(event.id, body["name"], body["input"], awaits=CUSTOM_TOOL_RESULT)
            case "agent.tool_result":
                self.pending.pop(event.json()["tool_use_id"], None)
                self.owes_reply = True
            case "user.custom_tool_result":
                # A repeated answer finds nothing, and changes nothing.
                if self.pending.pop(event.json()["custom_tool_use_id"], None) is not None:
                    self.owes_reply = True
            case "user.tool_confirmation":
                self._confirmed(event.json())
            case _:
                pass

    def _confirmed(self, body: dict[str, Any]) -> None:
        call = self.pending.get(body["tool_use_id"])
        if call is not None and call.awaits == TOOL_CONFIRMATION:
            refused = None if body["result"] == "allow" else rejection(call.name, body.get("deny_message"))
            self.pending[call.event_id] = replace(call, refused=refused, awaits=None)

    def _idle(self, stop_reason: dict[str, Any]) -> None:
        self.status = "idle"
        self.blocked_on = tuple(stop_reason.get("event_ids", ()))
        if self.blocked_on:
            return
        self.begun = False
        self.owes_reply = self.paused
        self.rounds = 0
        self.failures = 0
        self.failure_told = False
        self.stop_reason = None
        self.stop_details = None
        self.called_tools = False
        self.continuations = 0
        self.pauses = 0
        self.compactions = 0
        self.compaction_failed = False
        self.too_long = False

    def _span_end(self, event: StoredEvent) -> None:
        self.open_span = None
        private = event.private_json()
        response = private.get("response")
        if private.get("cut"):
            # By a crash or an interrupt: neither a try that failed nor a round.
            self.rounds -= 1
            return
        self.too_long = self.too_long or bool(private.get("too_long"))
        if (compaction := private.get("compaction")) is not None:
            self._compaction_end(useful=compaction["useful"])
            return
        if private.get("too_long"):
            self.rounds -= 1
            return
        if response is None:
            self.failures += 1
            return
        self._answered(response)

    def _compaction_end(self, *, useful: bool) -> None:
        """A summary was asked for and answered: no round of the turn."""
        self.rounds -= 1
        self.failures = 0
        self.failure_told = False
        if not useful:
            self.compactions += 1
            self.compaction_failed = True

    def _answered(self, response: dict[str, Any]) -> None:
        self.failures = 0
        self.failure_told = False
        self.stop_reason = response["stop_reason"]
        self.stop_details = response["stop_details"]
        cut_off = self.stop_reason in ("max_tokens", "model_context_window_exceeded") and not self.pending
        self.continuations = self.continuations + 1 if cut_off else 0
        self.pauses = self.pauses + 1 if self.stop_reason == "pause_turn" else 0
        self.too_long = self.stop_reason == "model_context_window_exceeded"
        # The model asked to be called again with what it has said so far, or could not finish.
        self.owes_reply = self.stop_reason == "pause_turn" or 0 < self.continuations <= limits.CONTINUATIONS_IN_A_ROW_MAX


_SNAPSHOT = TypeAdapter(Turn)


def snapshot(turn: Turn) -> dict[str, Any]:
    """`turn` as JSON, for a checkpoint in the log."""
    return _SNAPSHOT.dump_python(turn, mode="json")


def restored(value: dict[str, Any], *, seq: int) -> Turn:
    """The turn of a checkpoint, as of event `seq`. Fields that are newer than the snapshot take their defaults."""
    turn = _SNAPSHOT.validate_python(value)
    turn.seq = seq
    return turn
