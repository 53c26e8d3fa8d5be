"""What sandboxes asked for: one entry a request or tunnel, kept with the session; and how much traffic each had.

No paths, no headers: they may hold secrets. Entries are queued and written in batches beside the traffic; when the store does
not take them the oldest are dropped and counted, and traffic goes on. Traffic is written as it is, not when what it belongs to
ends: a gateway that is killed in the midst of a long tunnel forgets a second of it.
"""

import logging
import typing
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import anyio

QUEUED_MAX = 10_000
WRITE_SECONDS = 1.0
WRITE_SECONDS_MAX = 10.0

Protocol = Literal["http", "https", "connect", "socks"]  # https: where TLS was ended here
Outcome = Literal["allowed", "blocked", "refused_address", "unresolved", "unreachable", "over_limit", "bad_request"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Access:
    """A request that ended, or a tunnel."""

    session_id: str
    sandbox_id: str
    generation: int
    at: datetime
    protocol: Protocol
    host: str
    port: int
    outcome: Outcome
    bytes_sent: int
    bytes_received: int
    seconds: float


class LogFailed(Exception):
    """The store does not take entries now."""


class AccessStore(typing.Protocol):
    """Where entries are kept; wired where the process is put together."""

    async def write(self, entries: Sequence[Access], traffic: Mapping[str, int]) -> None:
        """Keep entries, and add to the traffic of sandboxes, by their ids. Raises: LogFailed."""
        ...


def now() -> datetime:
    return datetime.now(UTC)


class AccessLog:
    """Queues entries for a store."""

    def __init__(self, store: AccessStore) -> None:
        self._store = store
        self._queued: deque[Access] = deque()
        self._traffic: Counter[str] = Counter()
        self._dropped = 0

    def add(self, entry: Access) -> None:
        """Never waits."""
        if len(self._queued) >= QUEUED_MAX:
            self._queued.popleft()
            self._dropped += 1
        self._queued.append(entry)

    def count(self, sandbox_id: str, size: int) -> None:
        """Note bytes that moved. Never waits."""
        self._traffic[sandbox_id] += size

    async def run(self) -> None:
        """Write until cancelled, and once more then."""
        try:
            while True:
                await anyio.sleep(WRITE_SECONDS)
                await self.flush()
        finally:
            with anyio.move_on_after(WRITE_SECONDS, shield=True):
                await self.flush()

    async def flush(self) -> None:
        """Write what is queued. What the store does not take stays queued."""
        taken, self._queued = self._queued, deque()
        traffic, self._traffic = self._traffic, Counter()
        if not taken and not traffic:
            return
        written = False
        try:
            with anyio.fail_after(WRITE_SECONDS_MAX):
                await self._store.write(taken, traffic)
            written = True
        except (LogFailed, TimeoutError) as error:
            logger.warning("access log not written: %s", str(error) or "it took too long")
        finally:
            if not written:
                self._queued = deque([*taken, *self._queued][-QUEUED_MAX:])
                self._traffic.update(traffic)
        if written and self._dropped:
            logger.warning("access log lost entries", extra={"entries": self._dropped})
            self._dropped = 0
