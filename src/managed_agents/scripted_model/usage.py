"""Plausible usage: tokens are a quarter of the bytes, and a prefix cache that behaves as the real one is
documented to.

Invariant: input_tokens + cache_read + cache_creation is the size of the prompt. Entries live five minutes
or an hour after their last use, are keyed by model and by everything before the mark (tools, system,
messages, in that order), and their number is bounded.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import orjson

from managed_agents.scripted_model.catalog import Model
from managed_agents.scripted_model.checks import JsonObject
from managed_agents.scripted_model.signing import EMPTY, blocks_of, chained, encode

ENTRIES_MAX = 20_000
IMAGE_TOKENS = 1_500
_SECONDS = {"5m": 300.0, "1h": 3600.0}


def tokens(data: bytes) -> int:
    """Estimate the tokens of an encoded block."""
    return (len(data) + 3) // 4


@dataclass(frozen=True, slots=True)
class InputUsage:
    """What a prompt cost, split by what the cache did."""

    uncached: int
    cache_read: int
    cache_creation_5m: int
    cache_creation_1h: int

    @property
    def total(self) -> int:
        """Size of the prompt in tokens."""
        return self.uncached + self.cache_read + self.cache_creation_5m + self.cache_creation_1h

    def report(self) -> JsonObject:
        """Return the input half of `usage` (spec: usage.py)."""
        return {
            "input_tokens": self.uncached,
            "cache_creation_input_tokens": self.cache_creation_5m + self.cache_creation_1h,
            "cache_read_input_tokens": self.cache_read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": self.cache_creation_5m,
                "ephemeral_1h_input_tokens": self.cache_creation_1h,
            },
        }


def _size(block: JsonObject, encoded: bytes) -> int:
    if block.get("type") == "image":
        return IMAGE_TOKENS
    if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
        return sum(_size(inner, encode(inner)) for inner in cast("list[JsonObject]", block["content"])) + 12
    return tokens(encoded)


def _mark(block: JsonObject) -> str | None:
    mark = cast("JsonObject | None", block.get("cache_control"))
    if mark is None and block.get("type") == "tool_result" and isinstance(block.get("content"), list):
        inner = [_mark(each) for each in cast("list[JsonObject]", block["content"])]
        return next((ttl for ttl in reversed(inner) if ttl), None)
    return None if mark is None else cast("str", mark.get("ttl") or "5m")


def prompt_parts(request: JsonObject) -> Iterator[tuple[str, JsonObject]]:
    """Yield every block of the prompt with its role, in the order in which the model reads them."""
    for tool in cast("list[JsonObject]", request.get("tools") or []):
        yield "tool", tool
    for block in blocks_of(request.get("system")):
        yield "system prompt", block
    for message in cast("list[JsonObject]", request["messages"]):
        for block in blocks_of(message["content"]):
            yield cast("str", message["role"]), block


def count_tokens(request: JsonObject) -> int:
    """Return the size of the prompt; the cache is not looked at."""
    return sum(_size(block, encode(block)) + 1 for _, block in prompt_parts(request)) + 3


class PrefixCache:
    """The prompt cache of one scripted model. Not shared between processes; a restart empties it."""

    def __init__(self) -> None:
        self._expiry: OrderedDict[bytes, float] = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self._expiry.clear()

    def account(self, request: JsonObject, model: Model) -> InputUsage:
        """Return what this request's prompt costs, and remember what it asked to be cached."""
        now = time.time()
        digest = chained(EMPTY, "model", model.id.encode() + orjson.dumps(request.get("speed")))
        total, read = 3, 0
        marks: list[tuple[bytes, int, str]] = []
        known: list[tuple[bytes, int]] = []
        for role, block in prompt_parts(request):
            encoded = encode(block)
            digest = chained(digest, role, encoded)
            total += _size(block, encoded) + 1
            if (ttl := _mark(block)) is not None:
                marks.append((digest, total, ttl))
            if self._expiry.get(digest, 0.0) > now:
                known.append((digest, total))
        if (top := cast("JsonObject | None", request.get("cache_control"))) is not None:
            marks.append((digest, total, cast("str", top.get("ttl") or "5m")))
        marks = [mark for mark in marks if mark[1] >= model.cache_tokens_min]
        written = {"5m": 0, "1h": 0}
        if marks:
            reachable = [entry for entry in known if entry[1] <= marks[-1][1]]
            read = reachable[-1][1] if reachable else 0
            done = read
            for key, position, ttl in marks:
                written[ttl] += max(0, position - done)
                done = max(done, position)
                self._remember(key, now + _SECONDS[ttl])
            for key, _ in reachable[-1:]:
                self._remember(key, max(self._expiry[key], now + _SECONDS["5m"]))
        uncached = total - read - written["5m"] - written["1h"]
        return InputUsage(uncached, read, written["5m"], written["1h"])

    def _remember(self, key: bytes, expiry: float) -> None:
        self._expiry[key] = expiry
        self._expiry.move_to_end(key)
        while len(self._expiry) > ENTRIES_MAX:
            self._expiry.popitem(last=False)
