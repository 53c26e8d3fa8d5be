"""Prefixed ids.

An id is `<prefix>_01` followed by 22 base-62 characters: 48 bits of Unix milliseconds, then 80 random bits, so that
ids of one table sort roughly by age (index locality) and nobody can guess one. Clients treat them as opaque.
"""

import hashlib
import os
import re
import time
from typing import NewType

AgentId = NewType("AgentId", str)
ApiKeyId = NewType("ApiKeyId", str)
EnvironmentId = NewType("EnvironmentId", str)
EventId = NewType("EventId", str)
FileId = NewType("FileId", str)
OrganizationId = NewType("OrganizationId", str)
SessionId = NewType("SessionId", str)
SessionResourceId = NewType("SessionResourceId", str)
ThreadId = NewType("ThreadId", str)
WorkspaceId = NewType("WorkspaceId", str)
SandboxId = NewType("SandboxId", str)
WorkerId = NewType("WorkerId", str)

AGENT = "agent"
API_KEY = "apikey"
COMPARTMENT = "cmpt"
ENVIRONMENT = "env"
ENVIRONMENT_KEY = "envkey"
EVENT = "sevt"
FILE = "file"
ORGANIZATION = "org"
RATE_LIMIT = "rl"
RATE_LIMIT_GROUP = "rlg"
REQUEST = "req"
SANDBOX = "sbx"
SESSION = "sesn"
SESSION_RESOURCE = "sesrsc"
THREAD = "sthr"
WORKER = "wrk"
WORKSPACE = "wrkspc"

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Two digits at a time halve the divisions, and an id is made for every event and every request.
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_BODY_PAIRS = 11
_SHAPE = re.compile(r"[a-z]+_[0-9A-Za-z]{1,64}")


def new_id(prefix: str) -> str:
    """Return a fresh id with `prefix` (no underscore in it)."""
    return _rendered(prefix, (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10)))


def derived_id(prefix: str, *parts: str) -> str:
    """Return the id with `prefix` that `parts` always give: for what has no row of its own. Not a secret."""
    digest = hashlib.sha256("\x00".join(parts).encode()).digest()
    return _rendered(prefix, int.from_bytes(digest[:16]))


def _rendered(prefix: str, number: int) -> str:
    pairs: list[str] = []
    for _ in range(_BODY_PAIRS):
        number, pair = divmod(number, len(_PAIRS))
        pairs.append(_PAIRS[pair])
    pairs.reverse()
    return f"{prefix}_01{''.join(pairs)}"


def has_prefix(value: str, prefix: str) -> bool:
    """Say whether `value` is shaped like an id with `prefix`. Nothing is looked up."""
    return value.startswith(prefix + "_") and _SHAPE.fullmatch(value) is not None
