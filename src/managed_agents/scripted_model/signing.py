"""Signatures of thinking blocks, and the digests that they and the prompt cache are made of.

Invariant: a thinking block that comes back was made by a scripted model with the same key, for the same
model, with the same text, and (for models that bind it) behind the same messages. The key is a constant or
the operator's, never random, so a restarted scripted model still knows what it signed.
"""

import base64
import hashlib
import hmac
from collections.abc import Iterator, Sequence
from typing import cast

import orjson

from managed_agents.scripted_model.checks import JsonObject

DEFAULT_KEY = b"managed-agents scripted model, signing key of thinking blocks, version 1"
EMPTY = b"\0" * 16


def blocks_of(content: object) -> list[JsonObject]:
    """Return `content` as blocks; a string is one text block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return cast("list[JsonObject]", content or [])


def encode(block: JsonObject) -> bytes:
    """Encode what of a block the model sees: not its cache marks."""
    if "cache_control" in block:
        block = {name: value for name, value in block.items() if name != "cache_control"}
    if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
        inner = cast("list[JsonObject]", block["content"])
        block = {
            **block,
            "content": [{k: v for k, v in each.items() if k != "cache_control"} for each in inner],
        }
    return orjson.dumps(block, option=orjson.OPT_SORT_KEYS)


def chained(previous: bytes, role: str, encoded: bytes) -> bytes:
    """Return the digest of everything up to and including one more block."""
    return hashlib.blake2b(previous + role.encode() + b"\0" + encoded, digest_size=16).digest()


class Signer:
    """Signs and verifies thinking blocks under one key."""

    def __init__(self, key: bytes = DEFAULT_KEY) -> None:
        self._key = key

    def sign(self, *, model: str, thinking: str, prefix: bytes) -> str:
        """Return the signature of a thinking block that the model produced behind `prefix`."""
        parts = (model.encode(), thinking.encode("utf-8", "surrogatepass"), prefix)
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return base64.b64encode(b"\x01" + prefix + hmac.digest(self._key, message, "sha256")).decode()

    def is_genuine(self, signature: str, *, model: str, thinking: str, prefix: bytes | None) -> bool:
        """Say whether `sign` made this; `prefix` is None where thinking is not bound to it."""
        try:
            raw = base64.b64decode(signature, validate=True)
        except ValueError:
            return False
        signed_prefix = raw[1 : 1 + len(EMPTY)]
        if len(signed_prefix) != len(EMPTY) or (prefix is not None and prefix != signed_prefix):
            return False
        return hmac.compare_digest(signature, self.sign(model=model, thinking=thinking, prefix=signed_prefix))


def walk(messages: Sequence[JsonObject]) -> Iterator[tuple[int, int, JsonObject, bytes, bytes]]:
    """Yield every block: message index, block index, block, digest before its turn, digest up to itself."""
    digest = turn_start = EMPTY
    role_before = ""
    for number, message in enumerate(messages):
        role = cast("str", message["role"])
        if role != role_before:
            turn_start, role_before = digest, role
        for index, block in enumerate(blocks_of(message["content"])):
            digest = chained(digest, role, encode(block))
            yield number, index, block, turn_start, digest


def digest_of(messages: Sequence[JsonObject]) -> bytes:
    """Return the digest of a whole conversation."""
    digest = EMPTY
    for *_, digest in walk(messages):  # noqa: B007 - the last one is wanted
        pass
    return digest
