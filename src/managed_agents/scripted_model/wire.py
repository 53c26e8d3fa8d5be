"""From a script's parts to the bytes of a response: the exact event sequence of the Messages API, or one
message.

`play` is pure but for fresh ids. Events of a reply that neither waits nor breaks off are joined, so that
the usual answer is one write.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import orjson

from managed_agents.scripted_model.catalog import Model
from managed_agents.scripted_model.checks import JsonObject, Refused
from managed_agents.scripted_model.reply import (
    Cut,
    End,
    Fail,
    Pace,
    Part,
    ScriptError,
    Stall,
    Text,
    Thinking,
    ToolUse,
)
from managed_agents.scripted_model.rules import is_thinking, shows_thinking
from managed_agents.scripted_model.signing import Signer
from managed_agents.scripted_model.usage import InputUsage

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DELTAS_PER_BLOCK = 32  # of a reply without a pace
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def new_id(prefix: str) -> str:
    """Return a fresh id as the real API shapes them."""
    number = secrets.randbits(140)
    digits: list[str] = []
    for _ in range(22):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return f"{prefix}_01{''.join(digits)}"


def envelope(error_type: str, message: str, request_id: str) -> JsonObject:
    """Return the API's error envelope (spec: error_response.py)."""
    return {"type": "error", "error": {"type": error_type, "message": message}, "request_id": request_id}


def event(name: str, **data: object) -> bytes:
    """Encode one server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps({"type": name, **data}) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds of silence inside a stream."""

    seconds: float


class Broken:
    """The connection ends here, without the rest."""


BROKEN = Broken()
Step = bytes | Wait | Broken


@dataclass(frozen=True, slots=True)
class Played:
    """A response ready to be sent: as a stream's steps, and as the message for who asked for no stream."""

    delay_seconds: float
    fail: Fail | None
    steps: list[Step]
    message: JsonObject


@dataclass(slots=True)
class _Block:
    content: JsonObject
    deltas: list[JsonObject]
    waits: list[float]  # one before each delta, or none at all


class Player:
    """Plays one reply to one request."""

    def __init__(self, request: JsonObject, model: Model, input_usage: InputUsage, signer: Signer, prefix: bytes) -> None:
        self._request = request
        self._model = model
        self._input = input_usage
        self._signer = signer
        self._prefix = prefix
        self._pace: Pace | None = None
        self._chars_left = 4 * cast("int", request["max_tokens"])
        self._output_tokens = 0
        self._thinking_tokens = 0
        self._end: End | None = None
        self._stop_sequence: str | None = None
        self._blocks: list[JsonObject] = []
        self._steps: list[Step] = []
        self._parsed_input = True
        self._ended = False

    def play(self, parts: Sequence[Part], request_id: str) -> Played:
        """Return the response that `parts` describe."""
        delay = 0.0
        begun = False
        fail: Fail | None = None
        cut_after: int | None = None
        for part in parts:
            match part:
                case Stall():
                    if begun:
                        self._steps.append(Wait(part.seconds))
                    else:
                        delay += part.seconds
                case Pace():
                    self._pace = part
                case Cut(after_events=None):
                    self._steps.append(BROKEN)
                    begun = True
                case Cut():
                    cut_after = part.after_events
                case End():
                    self._end = part
                case Fail():
                    if not begun:
                        fail = part
                        break
                    error = envelope(part.error_type, part.message, request_id)
                    del error["type"]
                    self._steps += [event("error", **error), BROKEN]
                case Text() | Thinking() | ToolUse():
                    if not self._ended:
                        begun = True
                        self._add(part)
        message = self._message()
        steps = [self._start(message), *self._steps, *self._finish(message)]
        if cut_after is not None:
            steps = _first_events(steps, cut_after)
        if not self._parsed_input and fail is None and not self._request.get("stream"):
            raise ScriptError("broken_tool_use can only be sent in a stream")
        return Played(delay, fail, _joined(steps), message)

    def _add(self, part: Text | Thinking | ToolUse) -> None:
        if isinstance(part, Thinking):
            if not is_thinking(self._request, self._model):
                return
            self._emit(self._thinking_block(part))
        elif isinstance(part, Text):
            if not part.text.strip():
                raise ScriptError("text() needs some text")
            self._emit(self._text_block(part))
        else:
            self._emit(self._tool_use_block(part))

    def _take(self, value: str) -> str:
        """Return as much of `value` as `max_tokens` leaves room for."""
        taken = value[: self._chars_left]
        self._chars_left -= len(taken)
        self._output_tokens += (len(taken) + 3) // 4
        if len(taken) < len(value):
            self._ended = True
            self._end = End("max_tokens")
        return taken

    def _pieces(self, value: str, least: int = 16) -> tuple[list[str], list[float]]:
        pace = self._pace
        size = pace.chars if pace is not None else max(least, -(-len(value) // _DELTAS_PER_BLOCK))
        pieces = [value[i : i + size] for i in range(0, len(value), size)]
        return pieces, [pace.seconds] * len(pieces) if pace is not None else []

    def _text_block(self, part: Text) -> _Block:
        said = part.text
        for stop in cast("list[str]", self._request.get("stop_sequences") or []):
            before, found, _ = said.partition(stop)
            if found:
                said, self._ended, self._stop_sequence = before, True, stop
                self._end = End("stop_sequence")
        said = self._take(said)
        pieces, waits = self._pieces(said)
        deltas: list[JsonObject] = [{"type": "text_delta", "text": piece} for piece in pieces]
        return _Block({"type": "text", "text": said}, deltas, waits)

    def _thinking_block(self, part: Thinking) -> _Block:
        before = self._output_tokens
        thought = self._take(part.thinking)
        self._thinking_tokens += self._output_tokens - before
        if not shows_thinking(self._request, self._model):
            thought = ""
        pieces, waits = self._pieces(thought)
        signature = self._signer.sign(model=self._model.id, thinking=thought, prefix=self._prefix)
        deltas: list[JsonObject] = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
        deltas.append({"type": "signature_delta", "signature": signature})
        return _Block(
            {"type": "thinking", "thinking": thought, "signature": signature},
            deltas,
            [*waits, 0.0] if waits else [],
        )

    def _tool_use_block(self, part: ToolUse) -> _Block:
        whole = part.raw if part.raw is not None else orjson.dumps(part.input).decode()
        raw = self._take(whole)
        self._parsed_input = self._parsed_input and part.raw is None
        pieces, waits = self._pieces(raw, least=12)
        deltas: list[JsonObject] = [{"type": "input_json_delta", "partial_json": piece} for piece in ("", *pieces)]
        return _Block(
            {
                "type": "tool_use",
                "id": new_id("toolu"),
                "name": part.name,
                "input": part.input if raw == whole else {},
                "caller": {"type": "direct"},
            },
            deltas,
            [0.0, *waits] if waits else [],
        )

    def _emit(self, block: _Block) -> None:
        index = len(self._blocks)
        empty = {"text": "", "thinking": "", "signature": "", "input": dict[str, object]()}
        start = {name: empty.get(name, value) for name, value in block.content.items()}
        self._steps.append(event("content_block_start", index=index, content_block=start))
        if index == 0:
            self._steps.append(_PING)
        for number, delta in enumerate(block.deltas):
            if block.waits and block.waits[number] > 0:
                self._steps.append(Wait(block.waits[number]))
            self._steps.append(event("content_block_delta", index=index, delta=delta))
        self._steps.append(event("content_block_stop", index=index))
        self._blocks.append(block.content)

    def _message(self) -> JsonObject:
        called = any(block["type"] == "tool_use" for block in self._blocks)
        end = self._end or End("tool_use" if called else "end_turn")
        if self._request["max_tokens"] == 0:
            end = End("max_tokens")
        return {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": self._model.id,
            "content": self._blocks,
            "container": None,
            "stop_reason": end.stop_reason,
            "stop_sequence": self._stop_sequence,
            "stop_details": end.stop_details,
            "usage": {
                **self._input.report(),
                "output_tokens": self._output_tokens + 2 * len(self._blocks) + 1,
                "output_tokens_details": {"thinking_tokens": self._thinking_tokens},
                "server_tool_use": None,
                "service_tier": "standard",
                "inference_geo": self._request.get("inference_geo") or "global",
                "speed": "fast" if self._request.get("speed") == "fast" and self._model.fast == "served" else "standard",
            },
        }

    def _start(self, message: JsonObject) -> bytes:
        usage = {**cast("JsonObject", message["usage"]), "output_tokens": 1}
        del usage["output_tokens_details"]
        unknown: JsonObject = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
        }
        return event("message_start", message={**message, **unknown, "usage": usage})

    def _finish(self, message: JsonObject) -> list[bytes]:
        usage = cast("JsonObject", message["usage"])
        told = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
        delta = {name: message[name] for name in ("stop_reason", "stop_sequence", "stop_details", "container")}
        return [
            event(
                "message_delta",
                delta=delta,
                usage={name: usage[name] for name in (*told, "output_tokens_details", "server_tool_use")},
            ),
            event("message_stop"),
        ]


def _first_events(steps: list[Step], count: int) -> list[Step]:
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, bytes):
            if count == 0:
                break
            count -= 1
        kept.append(step)
    return [*kept, BROKEN]


def _joined(steps: list[Step]) -> list[Step]:
    joined: list[Step] = []
    run: list[bytes] = []
    for step in steps:
        if isinstance(step, bytes):
            run.append(step)
            continue
        if run:
            joined.append(b"".join(run))
            run = []
        joined.append(step)
        if isinstance(step, Broken):
            return joined
    if run:
        joined.append(b"".join(run))
    return joined


def refusal_body(refused: Refused, request_id: str) -> bytes:
    """Encode the answer to a request that was refused."""
    return orjson.dumps(envelope(refused.error_type, refused.message, request_id))
