"""What the scripted model was asked, for tests to look at: bounded in number and bytes, oldest dropped
first."""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import anyio
import orjson

from managed_agents.scripted_model.checks import JsonObject

RECORDS_MAX = 1_000
RECORD_BYTES_MAX = 64 * 1024 * 1024
WAIT_SECONDS_MAX = 300.0


@dataclass(slots=True)
class Record:
    """One request to the Messages API and what became of it."""

    number: int
    request_id: str
    path: str
    query: str
    betas: str
    raw: bytes
    received_at: float = field(default_factory=time.time)
    status: int | None = None
    error: str | None = None
    state: str = "received"  # then "streaming", and "finished", "cut" or "disconnected"

    def view(self) -> JsonObject:
        """Return the record as the control API shows it. Headers with keys were never kept."""
        try:
            body: object = orjson.loads(self.raw)
        except orjson.JSONDecodeError:
            body = None
        return {
            "number": self.number,
            "request_id": self.request_id,
            "path": self.path,
            "query": self.query,
            "betas": self.betas,
            "received_at": self.received_at,
            "status": self.status,
            "error": self.error,
            "state": self.state,
            "body": body,
        }


class Recorder:
    """Keeps the newest requests and wakes who waits for more. Used from one event loop."""

    def __init__(self, log: Path | None = None) -> None:
        self._records: deque[Record] = deque()
        self._bytes = 0
        self._total = 0
        self._changed = anyio.Event()
        self._log: BinaryIO | None = log.open("ab", buffering=0) if log is not None else None

    @property
    def total(self) -> int:
        """How many requests came since the start or the last reset."""
        return self._total

    def receive(self, request_id: str, path: str, query: str, betas: str, raw: bytes) -> Record:
        """Keep one more request."""
        self._total += 1
        record = Record(self._total, request_id, path, query, betas, raw)
        self._records.append(record)
        self._bytes += len(raw)
        while len(self._records) > RECORDS_MAX or (self._bytes > RECORD_BYTES_MAX and len(self._records) > 1):
            self._bytes -= len(self._records.popleft().raw)
        self.wake()
        return record

    def finish(self, record: Record, state: str) -> None:
        """Note what became of a request, in the log file too."""
        record.state = state
        self.wake()
        if self._log is not None:
            self._log.write(orjson.dumps(record.view()) + b"\n")

    def since(self, number: int) -> list[Record]:
        """Return the kept records after `number`, oldest first."""
        return [record for record in self._records if record.number > number]

    def clear(self) -> None:
        """Forget everything and count from zero again."""
        self._records.clear()
        self._bytes = self._total = 0
        self.wake()

    async def wait(self, count: int, state: str | None, seconds: float) -> bool:
        """Wait until `count` requests came (or reached `state`); False when `seconds` were not enough."""
        with anyio.move_on_after(min(seconds, WAIT_SECONDS_MAX)):
            while not self._reached(count, state):
                await self._changed.wait()
            return True
        return False

    def _reached(self, count: int, state: str | None) -> bool:
        if state is None:
            return self._total >= count
        return sum(record.state == state for record in self._records) >= count

    def wake(self) -> None:
        """Let waiters look again."""
        self._changed.set()
        self._changed = anyio.Event()
