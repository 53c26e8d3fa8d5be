"""What a script answers with: parts in the order in which they happen.

A reply is a string, a part, or a list of both. Parts are content blocks (`text`, `thinking`, `tool_use`),
things that happen between them (`stall`, `pace`, `cut`, `fail`), and how the message ends (`refuse`,
`stop_reason`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from managed_agents.scripted_model.checks import JsonObject


@dataclass(frozen=True, slots=True)
class Text:
    """A text block."""

    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """A thinking block, signed when it is sent. Left out where the request does not think."""

    thinking: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A tool call. `raw` is sent instead of `input` when given: it may be broken JSON (streams only)."""

    name: str
    input: JsonObject
    raw: str | None = None


@dataclass(frozen=True, slots=True)
class Stall:
    """Silence: before the response when first, inside the stream otherwise."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Pace:
    """From here on wait this long before every delta of at most `chars` characters."""

    seconds: float
    chars: int


@dataclass(frozen=True, slots=True)
class Cut:
    """End the connection: here, or once `after_events` events were sent."""

    after_events: int | None


@dataclass(frozen=True, slots=True)
class Fail:
    """An error: the HTTP answer when first, an `error` event inside the stream otherwise."""

    status: int
    message: str
    error_type: str
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class End:
    """How the message ends."""

    stop_reason: str
    stop_details: JsonObject | None = None


Part = Text | Thinking | ToolUse | Stall | Pace | Cut | Fail | End
Reply = str | Part | Sequence[str | Part]

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_MESSAGES = {
    429: "This request would exceed your rate limit",
    500: "Internal server error",
    529: "Overloaded",
}
_CATEGORIES = ("cyber", "bio", "frontier_llm", "reasoning_extraction", "general_harms")
_STOP_REASONS = (
    "end_turn",
    "max_tokens",
    "stop_sequence",
    "tool_use",
    "pause_turn",
    "refusal",
    "model_context_window_exceeded",
)


class ScriptError(Exception):
    """The script is wrong, not the request: answered as a 500 that says what."""


def text(text: str) -> Text:
    """Say something."""
    return Text(text)


def thinking(thinking: str) -> Thinking:
    """Think; left out of the response where the request switched thinking off."""
    return Thinking(thinking)


def tool_use(name: str, /, **inputs: object) -> ToolUse:
    """Call a tool with these inputs."""
    return ToolUse(name, inputs)


def broken_tool_use(name: str, raw: str) -> ToolUse:
    """Call a tool with an input that is sent as written, for instance unfinished JSON."""
    return ToolUse(name, {}, raw)


def stall(seconds: float) -> Stall:
    """Be silent for some seconds."""
    return Stall(seconds)


def pace(*, chars_per_second: float | None = None, seconds_per_delta: float | None = None) -> Pace:
    """Slow the deltas that follow; exactly one of the two."""
    if (chars_per_second is None) == (seconds_per_delta is None):
        raise ScriptError("pace() takes either chars_per_second or seconds_per_delta")
    if chars_per_second is not None:
        chars = max(1, round(chars_per_second / 50))  # at most about fifty deltas a second
        return Pace(chars / chars_per_second, chars)
    return Pace(cast("float", seconds_per_delta), 16)


def cut(after_events: int | None = None) -> Cut:
    """Drop the connection without ending the message: here, or after so many events."""
    return Cut(after_events)


def fail(status: int, message: str | None = None, *, retry_after: float | None = None) -> Fail:
    """Answer with an error: as the whole answer, or as an `error` event when something was said before."""
    error_type = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return Fail(status, message or _MESSAGES.get(status, f"Scripted error {status}"), error_type, retry_after)


def refuse(category: str | None = None, explanation: str | None = None) -> End:
    """End with stop reason `refusal`."""
    if category is not None and category not in _CATEGORIES:
        raise ScriptError(f"refuse(): category is one of {', '.join(_CATEGORIES)}")
    return End("refusal", {"type": "refusal", "category": category, "explanation": explanation})


def stop_reason(stop_reason: str) -> End:
    """End with this stop reason instead of the natural one (`tool_use` after tool calls, else `end_turn`)."""
    if stop_reason not in _STOP_REASONS:
        raise ScriptError(f"stop_reason(): one of {', '.join(_STOP_REASONS)}")
    return End(stop_reason)


def parts_of(reply: object) -> list[Part]:
    """Return what a script answered as a list of parts. Raises: ScriptError when it is none."""
    if isinstance(reply, str):
        return [Text(reply)]
    if isinstance(reply, Part):
        return [reply]
    if isinstance(reply, (list, tuple)):
        parts: list[Part] = []
        for each in cast("list[object]", reply):
            parts.extend(parts_of(each))
        if not parts:
            raise ScriptError("the script answered with an empty list")
        return parts
    raise ScriptError(f"the script answered with {type(reply).__name__}; a string, a part or a list of them was expected")
