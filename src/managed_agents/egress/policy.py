"""What a sandbox may reach by name. Pure, save for the cache.

Names only: which addresses they may stand for is decided when the connection is made (`connect.py`). A policy that cannot be
read is no permission: once the cached one is too old, requests fail until it can be read again.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Literal, Protocol

Mode = Literal["unrestricted", "limited"]
CACHE_SECONDS_MAX = 5.0
CACHED_MAX = 10_000
HOST_CHARS_MAX = 253
HTTPS_PORT = 443

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")


class PolicyUnknown(Exception):
    """The policy cannot be read now."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Requests that get a credential (`substitution.py`). Holds no secret: policies are kept for seconds."""

    source: str
    """The name of the `Source` that knows the secret."""
    id: str
    """What the source calls it by."""
    hosts: tuple[str, ...]
    """As `allowed_hosts` of networking, and `*` for every host."""
    paths: tuple[str, ...] = ()
    """Requests to these paths and below, in whatever case. None: all."""
    port: int = HTTPS_PORT
    opens: bool = False
    """Whether covered requests are let through where networking does not allow the host."""

    def covers(self, host: str, port: int) -> bool:
        """Whether TLS to that place is ended here."""
        return port == self.port and any(pattern == "*" or matches(pattern, host) for pattern in self.hosts)

    def covers_path(self, target: bytes) -> bool:
        """Whether a request there gets the credential. What servers may read in several ways is not covered."""
        if not self.paths:
            return True
        path = target.partition(b"?")[0].lower()
        if b"//" in path or b"\\" in path or b"%" in path or any(part in (b".", b"..") for part in path.split(b"/")):
            return False
        wanted = [text.lower().rstrip("/").encode() for text in self.paths]
        return any(path == one or path.startswith(one + b"/") for one in wanted)


@dataclass(frozen=True, slots=True)
class Policy:
    """What one sandbox may do."""

    session_id: str
    mode: Mode
    hosts: tuple[str, ...] = ()
    """Of `limited`: a name stands for itself, `*.` before it for everything below it and not for the name."""
    bindings: tuple[Binding, ...] = ()
    bytes_before: int = 0
    """What the session has used already, in all of its sandboxes, as far as it was recorded."""

    def allows(self, host: str) -> bool:
        """Whether connections to `host`, as `normal_host` gives it, are wanted."""
        return self.mode == "unrestricted" or any(matches(pattern, host) for pattern in self.hosts)

    def bound(self, host: str, port: int) -> tuple[Binding, ...]:
        """The bindings that cover a place, the most particular last. Any: TLS to there is ended here."""
        usable = [one for one in self.bindings if one.covers(host, port) and (one.opens or self.allows(host))]
        return tuple(sorted(usable, key=lambda one: max((len(path) for path in one.paths), default=0)))


class EgressPolicy(Protocol):
    """Tells the gateway what a sandbox may do; wired where the process is put together."""

    async def policy(self, sandbox_id: str, generation: int) -> Policy | None:
        """None for a sandbox that has no session any more.

        Raises: PolicyUnknown.
        """
        ...


def matches(pattern: str, host: str) -> bool:
    """Whether an entry of `allowed_hosts` covers a host. spec: exact names; a wildcard does not cover the apex."""
    pattern = pattern.lower().rstrip(".")
    return host.endswith(pattern[1:]) and host != pattern[2:] if pattern.startswith("*.") else host == pattern


def normal_host(text: str) -> str | None:
    """Return a host as it is compared: lower case, no dot at the end, no brackets. None for what is no host."""
    if text.startswith("["):
        try:
            # A zone would choose an interface of this machine.
            return str(IPv6Address(text[1:-1])) if text.endswith("]") and "%" not in text else None
        except ValueError:
            return None
    host = text.lower().removesuffix(".")
    return host if len(host) <= HOST_CHARS_MAX and _NAME.fullmatch(host) else None


class CachedPolicies:
    """Asks again for what is older than five seconds; concurrent questions may ask twice, which is harmless."""

    def __init__(self, source: EgressPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock = source, clock
        self._kept: dict[tuple[str, int], tuple[float, Policy | None]] = {}

    async def policy(self, sandbox_id: str, generation: int) -> Policy | None:
        """As `EgressPolicy.policy`."""
        key, asked = (sandbox_id, generation), self._clock()
        found = self._kept.get(key)
        if found is not None and asked - found[0] < CACHE_SECONDS_MAX:
            return found[1]
        policy = await self._source.policy(sandbox_id, generation)
        if len(self._kept) >= CACHED_MAX:
            self._kept.clear()
        self._kept[key] = (asked, policy)  # as of the question: the answer may be older than its arrival
        return policy
