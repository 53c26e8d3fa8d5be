"""What a model response is made of while it streams, and the pure fold from server-sent events to it.

Invariant: `MessageFinished.content` is what the API sent, losslessly: unknown block types, unknown fields,
signatures and encrypted parts included, because the next request has to return them unaltered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

JsonObject = dict[str, Any]

COUNT_MAX = 1_000_000_000  # of a usage: beyond it an endpoint talks nonsense, and sums would outgrow their columns

CUT_OFF = ("max_tokens", "model_context_window_exceeded")  # stop reasons: the last block may be unfinished


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """The body of a Messages request without `stream`, and the beta values to send with it."""

    body: Mapping[str, object] = field(repr=False)
    betas: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadToolInput:
    """A tool call's input that is not a JSON object, as the model wrote it."""

    raw: str


@dataclass(frozen=True, slots=True)
class MessageStarted:
    """The response began."""

    id: str
    model: str
    usage: JsonObject
    request_id: str | None


@dataclass(frozen=True, slots=True)
class BlockStarted:
    """Block `index` began; `block` is its empty form."""

    index: int
    block: JsonObject


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of block `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class BlockFinished:
    """Block `index` is complete. A tool input that cannot be parsed is `{}` in it and told in `bad_input`."""

    index: int
    block: JsonObject
    bad_input: BadToolInput | None


@dataclass(frozen=True, slots=True)
class MessageFinished:
    """The whole response. `bad_inputs` maps a block's index to its unusable input, blank where none of it came."""

    id: str
    model: str
    stop_reason: str | None
    stop_sequence: str | None
    stop_details: JsonObject | None
    usage: JsonObject
    content: list[JsonObject]
    bad_inputs: dict[int, BadToolInput]
    request_id: str | None


ModelEvent = MessageStarted | BlockStarted | TextDelta | BlockFinished | MessageFinished


class ProtocolBroken(Exception):
    """The event stream is not one the Messages API would send."""


@dataclass(slots=True)
class _OpenBlock:
    block: JsonObject
    texts: list[str] = field(default_factory=lambda: [])
    thoughts: list[str] = field(default_factory=lambda: [])
    partial_json: list[str] = field(default_factory=lambda: [])


class MessageFold:
    """Folds decoded event data, in order, into model events. One per response."""

    def __init__(self, request_id: str | None) -> None:
        self._request_id = request_id
        self._message: JsonObject | None = None
        self._open: dict[int, _OpenBlock] = {}
        self._content: list[JsonObject] = []
        self._bad_inputs: dict[int, BadToolInput] = {}
        # The newest call of which no byte of input came: it has none, or was cut off before.
        self._without_input: int | None = None

    def fold(self, data: JsonObject) -> ModelEvent | None:
        """Take one event; return what it means to the harness, if anything. Raises: ProtocolBroken."""
        try:
            return self._fold(data)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ProtocolBroken(f"malformed {data.get('type')} event") from error

    def _fold(self, data: JsonObject) -> ModelEvent | None:
        kind = data["type"]
        if kind == "message_start":
            message = self._message = cast("JsonObject", data["message"])
            return MessageStarted(message["id"], message["model"], message["usage"], self._request_id)
        if self._message is None:
            raise ValueError(kind)
        match kind:
            case "content_block_start":
                index, block = data["index"], cast("JsonObject", data["content_block"])
                if index != len(self._content) + len(self._open):
                    raise ValueError(index)
                if block["type"] == "text" and not isinstance(block.get("text"), str | None):
                    raise TypeError("text")
                self._open[index] = _OpenBlock(block)
                return BlockStarted(index, block)
            case "content_block_delta":
                return self._delta(data["index"], data["delta"])
            case "content_block_stop":
                return self._finish_block(data["index"])
            case "message_delta":
                self._message.update(data["delta"])
                self._message["usage"] = _merged(self._message["usage"], data.get("usage") or {})
                return None
            case "message_stop":
                return self._finish(self._message)
            case _:
                return None  # the API adds event types; an unknown one is to be ignored

    def _delta(self, index: int, delta: JsonObject) -> TextDelta | None:
        opened = self._open[index]
        match delta["type"]:
            case "text_delta":
                opened.texts.append(delta["text"])
                return TextDelta(index, delta["text"])
            case "thinking_delta":
                opened.thoughts.append(delta["thinking"])
            case "signature_delta":
                opened.block = {**opened.block, "signature": delta["signature"]}
            case "input_json_delta":
                opened.partial_json.append(delta["partial_json"])
            case "citations_delta":
                said: list[object] = [*(opened.block.get("citations") or []), delta["citation"]]
                opened.block = {**opened.block, "citations": said}
            case "compaction_delta":
                rest = {name: value for name, value in delta.items() if name != "type" and value is not None}
                opened.block = {**opened.block, **rest}
            case unknown:
                raise ValueError(unknown)  # dropping it would lose part of what has to be returned unaltered
        return None

    def _finish_block(self, index: int) -> BlockFinished:
        opened = self._open.pop(index)
        if index != len(self._content):
            raise ValueError(index)
        block = dict(opened.block)
        bad: BadToolInput | None = None
        if opened.texts:
            block["text"] = "".join([block.get("text") or "", *opened.texts])
        if opened.thoughts:
            block["thinking"] = "".join([block.get("thinking") or "", *opened.thoughts])
        if raw := "".join(opened.partial_json):
            block["input"], bad = _tool_input(raw)
        elif block["type"] == "tool_use" and not block.get("input"):
            self._without_input = index
        if bad is not None:
            self._bad_inputs[index] = bad
        self._content.append(block)
        return BlockFinished(index, block, bad)

    def _finish(self, message: JsonObject) -> MessageFinished:
        if self._open:
            raise ValueError("message_stop inside a block")
        model, stop_reason, details = message["model"], message.get("stop_reason"), message.get("stop_details")
        if not isinstance(model, str) or not isinstance(stop_reason, str | None):
            raise TypeError("model or stop_reason")
        last = len(self._content) - 1
        if stop_reason in CUT_OFF and self._without_input == last:
            self._bad_inputs[last] = BadToolInput("")
        return MessageFinished(
            id=message["id"],
            model=model,
            stop_reason=stop_reason,
            stop_sequence=message.get("stop_sequence"),
            stop_details=cast("JsonObject", details) if isinstance(details, dict) else None,
            usage=_counted(message["usage"]),
            content=self._content,
            bad_inputs=self._bad_inputs,
            request_id=self._request_id,
        )


def _tool_input(raw: str) -> tuple[JsonObject, BadToolInput | None]:
    try:
        value: object = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}, BadToolInput(raw)
    if not isinstance(value, dict):
        return {}, BadToolInput(raw)
    return cast("JsonObject", value), None


def _counted(usage: JsonObject) -> JsonObject:
    """Return `usage` without the counts that cannot be true: everybody adds them up. Fields we do not know stay as they are."""
    counted: JsonObject = {}
    for name, value in usage.items():
        if name in ("cache_creation", "server_tool_use"):
            if isinstance(value, dict):
                counted[name] = _counted(cast("JsonObject", value))
        elif not name.endswith(("_tokens", "_requests")) or (type(value) is int and 0 <= value <= COUNT_MAX):
            counted[name] = value
    return counted


def _merged(first: JsonObject, last: JsonObject) -> JsonObject:
    """Return the usage of `message_start` with what `message_delta` tells, null where it tells nothing."""
    return {
        **first,
        **{name: value for name, value in last.items() if value is not None or name not in first},
    }
