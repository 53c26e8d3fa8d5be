"""Events as values: how each is built and encoded. Pure.

An event is encoded once, when it is built; the append adds `processed_at` under the session's lock and the resulting bytes
are what the table stores and every subscriber gets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import orjson

from managed_agents.core import ids

# `NewEvent` and `StoredEvent` are tuples, not frozen dataclasses: two are made for every event, at a fifth of the cost.

Json = Mapping[str, Any]

# Types that clients may see in a history (spec: beta_managed_agents_session_event_type.py).
PERSISTED_TYPES = frozenset(
    {
        "agent.custom_tool_use",
        "agent.mcp_tool_result",
        "agent.mcp_tool_use",
        "agent.message",
        "agent.thinking",
        "agent.thread_context_compacted",
        "agent.thread_message_received",
        "agent.thread_message_sent",
        "agent.tool_result",
        "agent.tool_use",
        "session.error",
        "session.status_idle",
        "session.status_rescheduled",
        "session.status_running",
        "session.status_terminated",
        "session.thread_created",
        "session.thread_status_idle",
        "session.thread_status_rescheduled",
        "session.thread_status_running",
        "session.thread_status_terminated",
        "session.updated",
        "session.usage",
        "span.model_request_end",
        "span.model_request_start",
        "span.outcome_evaluation_end",
        "span.outcome_evaluation_ongoing",
        "span.outcome_evaluation_start",
        "system.message",
        "user.custom_tool_result",
        "user.define_outcome",
        "user.interrupt",
        "user.message",
        "user.tool_confirmation",
        "user.tool_result",
        "workflow_run.created",
        "workflow_run.error",
        "workflow_run.phase_ended",
        "workflow_run.phase_started",
        "workflow_run.status_ended",
        "workflow_run.status_idle",
        "workflow_run.status_running",
    }
)

TOOL_CONFIRMATION = "user.tool_confirmation"
CUSTOM_TOOL_RESULT = "user.custom_tool_result"


@dataclass(frozen=True, slots=True)
class SpanUsage:
    """What one model request used. Tokens; `cost` in US dollars, null when the model has no list price."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_5m_input_tokens: int = 0
    cache_1h_input_tokens: int = 0
    web_searches: int = 0
    cost: Decimal | None = Decimal(0)

    def as_json(self) -> dict[str, Any]:
        """The form kept in the private part."""
        return {
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cache_read_input_tokens": self.cache_read_input_tokens,
            "cache_5m_input_tokens": self.cache_5m_input_tokens,
            "cache_1h_input_tokens": self.cache_1h_input_tokens,
            "web_searches": self.web_searches,
            "cost": None if self.cost is None else str(self.cost),
        }

    def plus(self, other: "SpanUsage") -> "SpanUsage":
        """Both together. A cost that is unknown makes the sum unknown."""
        return SpanUsage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_read_input_tokens + other.cache_read_input_tokens,
            self.cache_5m_input_tokens + other.cache_5m_input_tokens,
            self.cache_1h_input_tokens + other.cache_1h_input_tokens,
            self.web_searches + other.web_searches,
            None if self.cost is None or other.cost is None else self.cost + other.cost,
        )

    @classmethod
    def from_json(cls, value: Json) -> "SpanUsage":
        """Read the form that `as_json` wrote."""
        counts: dict[str, int] = {key: count for key, count in value.items() if key != "cost"}
        return cls(**counts, cost=None if value["cost"] is None else Decimal(value["cost"]))


class NewEvent(NamedTuple):
    """An event about to be appended. `payload` is its JSON object without `processed_at`.

    `payload` is null for `session.usage` only: its figures are those of the fold at that very position, so the append
    renders it.
    """

    type: str
    id: str
    thread_id: str
    payload: bytes | None
    tool_use_id: str | None = None
    private: bytes | None = None
    usage: SpanUsage | None = None
    for_model: bool = True
    # A call that waits for its client: the type of the event that answers it.
    awaits: str | None = None
    # Where it waited, for what did.
    inbox_seq: int | None = None


class StoredEvent(NamedTuple):
    """A row of the log. `body` is the public JSON, `private` the private one."""

    session_id: str
    seq: int
    id: str
    thread_id: str
    type: str
    body: bytes
    private: bytes | None = None
    for_model: bool = True

    def json(self) -> dict[str, Any]:
        """The public event as an object."""
        return orjson.loads(self.body)

    def private_json(self) -> dict[str, Any]:
        """The private part as an object; empty when there is none."""
        return orjson.loads(self.private) if self.private is not None else {}


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """A row of the inbox."""

    session_id: str
    inbox_seq: int
    id: str
    thread_id: str
    type: str
    payload: bytes

    def taken_up(self, *, for_model: bool = True) -> NewEvent:
        """The event as it enters the log: same id, same fields."""
        return NewEvent(
            self.type, self.id, self.thread_id, self.payload, self.answers, for_model=for_model, inbox_seq=self.inbox_seq
        )

    @property
    def answers(self) -> str | None:
        """The id of the tool use that this event answers."""
        return orjson.loads(self.payload)["tool_use_id"] if self.type == TOOL_CONFIRMATION else None


def new_event(
    event_type: str,
    thread_id: str,
    fields: Json | None = None,
    *,
    event_id: str | None = None,
    tool_use_id: str | None = None,
    private: Json | None = None,
    usage: SpanUsage | None = None,
    awaits: str | None = None,
) -> NewEvent:
    """Build and encode an event. `fields` are its own ones: `type`, `id` and `processed_at` are added here and on append."""
    assert event_type in PERSISTED_TYPES, event_type
    event_id = event_id or ids.new_id(ids.EVENT)
    if usage is not None:
        private = {**(private or {}), "usage": usage.as_json()}
    return NewEvent(
        event_type,
        event_id,
        thread_id,
        orjson.dumps({"type": event_type, "id": event_id, **(fields or {})}),
        tool_use_id,
        None if private is None else orjson.dumps(private),
        usage,
        awaits=awaits,
    )


def usage_event(thread_id: str) -> NewEvent:
    """`session.usage`, rendered by the append from the fold at its position."""
    return NewEvent("session.usage", ids.new_id(ids.EVENT), thread_id, None)


def with_processed_at(payload: bytes, processed_at: str | None) -> bytes:
    """Complete an encoded event with its `processed_at` (null while it waits)."""
    stamp = b"null" if processed_at is None else b'"%b"' % processed_at.encode()
    return b'%b,"processed_at":%b}' % (payload[:-1], stamp)


def running(thread_id: str, agent_name: str) -> list[NewEvent]:
    """The pair that opens a running period. Shared by the API (idle session) and the harness (all else)."""
    return [
        new_event("session.status_running", thread_id),
        new_event(
            "session.thread_status_running",
            thread_id,
            {"session_thread_id": thread_id, "agent_name": agent_name},
        ),
    ]


def idle(
    thread_id: str, agent_name: str, stop_reason: Json, stop_details: Json | None = None, *, of_session: Json | None = None
) -> list[NewEvent]:
    """The three events that close a running period, in their fixed order. `of_session` is its reason where it differs."""
    return [
        new_event(
            "session.thread_status_idle",
            thread_id,
            {
                "session_thread_id": thread_id,
                "agent_name": agent_name,
                "stop_reason": stop_reason,
                "stop_details": stop_details,
            },
        ),
        usage_event(thread_id),
        new_event("session.status_idle", thread_id, {"stop_reason": of_session or stop_reason, "stop_details": stop_details}),
    ]


def rescheduled(thread_id: str, agent_name: str) -> list[NewEvent]:
    """The pair that parks a session until its next try."""
    return [
        new_event("session.status_rescheduled", thread_id),
        new_event(
            "session.thread_status_rescheduled",
            thread_id,
            {"session_thread_id": thread_id, "agent_name": agent_name},
        ),
    ]


def thread_terminated(thread_id: str, agent_name: str) -> NewEvent:
    """The end of a thread."""
    return new_event(
        "session.thread_status_terminated",
        thread_id,
        {"session_thread_id": thread_id, "agent_name": agent_name},
    )


def terminated(thread_id: str, agent_name: str) -> list[NewEvent]:
    """The end of a session: its primary thread, then itself."""
    return [thread_terminated(thread_id, agent_name), new_event("session.status_terminated", thread_id)]


def session_error(
    thread_id: str, error_type: str, message: str, retry_status: str, more: Mapping[str, object] | None = None
) -> NewEvent:
    """`session.error` with `retry_status` one of retrying, exhausted, terminal; `more` are fields of this type of error."""
    error = {"type": error_type, "message": message, **(more or {}), "retry_status": {"type": retry_status}}
    return new_event("session.error", thread_id, {"error": error})


def span_start(thread_id: str) -> NewEvent:
    """Opens a model request."""
    return new_event("span.model_request_start", thread_id)


def span_end(
    thread_id: str,
    start_id: str,
    usage: SpanUsage,
    *,
    is_error: bool,
    private: Json | None = None,
    speed: str | None = None,
) -> NewEvent:
    """Closes a model request; a failed one reports zeros. `private` carries the raw response of a good one."""
    model_usage: dict[str, Any] = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_creation_input_tokens": usage.cache_5m_input_tokens + usage.cache_1h_input_tokens,
        "cache_read_input_tokens": usage.cache_read_input_tokens,
    }
    if speed is not None:
        model_usage["speed"] = speed
    return new_event(
        "span.model_request_end",
        thread_id,
        {"model_request_start_id": start_id, "is_error": is_error, "model_usage": model_usage},
        private=private,
        usage=usage,
    )


def tool_result(
    thread_id: str, tool_use_id: str, content: Sequence[Json], *, is_error: bool, usage: SpanUsage | None = None
) -> NewEvent:
    """`agent.tool_result` for the tool use event `tool_use_id`, repaired where the model API would refuse it.

    `usage` is what the call itself cost.
    """
    return new_event(
        "agent.tool_result",
        thread_id,
        {"tool_use_id": tool_use_id, "content": repaired(content, is_error=is_error), "is_error": is_error},
        tool_use_id=tool_use_id,
        usage=usage,
    )


def repaired(content: Sequence[Json], *, is_error: bool) -> list[Json]:
    """Make tool output acceptable as a tool result: no blank text, never empty, only text in an error."""
    kept = [
        block
        for block in content
        if (block["type"] != "text" or block["text"].strip()) and (block["type"] == "text" or not is_error)
    ]
    return kept or [{"type": "text", "text": "(no output)"}]
