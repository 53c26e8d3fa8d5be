"""The runner's memory across restarts of the same sandbox: calls begun, outcomes not yet acknowledged,
highest epoch.

One file a call, in a directory only uid 0 can read, on a disk the commands cannot fill. A file says
`running` from before the call starts until its outcome replaces it by rename. Found at start, `running`
means the runner died in the midst: the call gets an error outcome and is not run again.

The host's disk may be full all the same. Then the few bytes without which no call can begin go into files
that were made ahead, or are there already: a model that may run nothing could not make room, either.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OUTCOMES_MAX = 1_000
OUTCOME_BYTES_MAX = 256 * 1024 * 1024
MEMORY_BYTES_MAX = 64 * 1024
FULL = (errno.ENOSPC, errno.EDQUOT)
SPARES = 8  # calls that can be under way on a full disk
SPARE_BYTES = 4096
INTERRUPTED = "Tool execution was interrupted by a crash. Please retry."  # spec: observed text


@dataclass(frozen=True)
class Outcome:
    """A finished call. `content` is JSON text of content blocks."""

    content: bytes
    is_error: bool
    spill_path: str | None = None

    def header(self) -> dict[str, Any]:
        return {"op": "outcome", "is_error": self.is_error, "spill_path": self.spill_path}


def error_outcome(message: str) -> Outcome:
    """Return an error of one text block."""
    return Outcome(json.dumps([{"type": "text", "text": message}]).encode(), True)


class Journal:
    """Bounded by number and bytes. Small outcomes are kept in memory as well, so that a warm call reads
    nothing.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._small: dict[str, Outcome] = {}
        self._sizes: dict[str, int] = {}
        self._epoch = -1
        self._epoch_file = os.path.join(directory, "epoch")
        if os.path.exists(self._epoch_file):
            with open(self._epoch_file) as file:
                self._epoch = int(file.read() or "-1")
        self._spares = [name for name in map(self._spare, range(SPARES)) if os.path.exists(name)]
        self._make_ahead()

    def _make_ahead(self) -> None:
        """Take the room that a full disk would not give; on one that is full already there is less of it."""
        try:
            self._store_epoch(self._epoch)
            for name in map(self._spare, range(SPARES)):
                if name not in self._spares:
                    self._write_new(name, bytes(SPARE_BYTES))
                    self._spares.append(name)
        except OSError as error:
            if error.errno not in FULL:
                raise

    def _spare(self, number: int) -> str:
        return os.path.join(self._directory, f"spare-{number}")

    @property
    def epoch(self) -> int:
        return self._epoch

    def raise_epoch(self, epoch: int) -> None:
        """Remember a higher epoch."""
        self._store_epoch(epoch)
        self._epoch = epoch

    def _store_epoch(self, epoch: int) -> None:
        # In place, which takes no room: so few bytes are written at once or not at all.
        fd = os.open(self._epoch_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"%020d" % epoch)
        finally:
            os.close(fd)

    @property
    def full(self) -> bool:
        return len(self._sizes) >= OUTCOMES_MAX or sum(self._sizes.values()) >= OUTCOME_BYTES_MAX

    def _path(self, tool_use_id: str) -> str:
        return os.path.join(self._directory, hashlib.sha256(tool_use_id.encode()).hexdigest()[:40] + ".call")

    def _write(self, path: str, data: bytes) -> None:
        try:
            self._write_new(path, data)
        except OSError as error:
            if error.errno not in FULL or len(data) > SPARE_BYTES or not self._spares:
                raise
            # Its blocks are there already, and what is behind the data goes before anybody reads it.
            spare = self._spares[-1]
            _fill(spare, data, os.O_WRONLY)
            os.rename(spare, path)
            self._spares.pop()

    def _write_new(self, path: str, data: bytes) -> None:
        partial = path + ".part"
        try:
            _fill(partial, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        except OSError:
            if os.path.exists(partial):
                os.unlink(partial)
            raise
        os.rename(partial, path)

    def load(self) -> Iterator[str]:
        """Yield the ids of calls known from before; those that were running become errors."""
        for name in os.listdir(self._directory):
            if not name.endswith(".call"):
                continue
            with open(os.path.join(self._directory, name), "rb") as file:
                head = json.loads(file.readline())
                size = len(file.read())
            tool_use_id = str(head["tool_use_id"])
            self._sizes[tool_use_id] = size
            if head["state"] == "running":
                self.finish(tool_use_id, error_outcome(INTERRUPTED))
            yield tool_use_id

    def begin(self, tool_use_id: str) -> None:
        """Record that a call is about to run. Raises: OSError, and then it must not run."""
        line = json.dumps({"tool_use_id": tool_use_id, "state": "running"})
        self._write(self._path(tool_use_id), line.encode() + b"\n")
        self._sizes[tool_use_id] = 0

    def finish(self, tool_use_id: str, outcome: Outcome) -> None:
        """Keep an outcome until it is acknowledged."""
        head = {"tool_use_id": tool_use_id, "state": "done", **outcome.header()}
        self._sizes[tool_use_id] = len(outcome.content)
        try:
            self._write_new(self._path(tool_use_id), json.dumps(head).encode() + b"\n" + outcome.content)
        except OSError:
            # The disk is full or broken: memory must do, the answer matters more than the bound on it.
            self._small[tool_use_id] = outcome
        if len(outcome.content) <= MEMORY_BYTES_MAX:
            self._small[tool_use_id] = outcome

    def outcome(self, tool_use_id: str) -> Outcome:
        """Return a kept outcome."""
        if (small := self._small.get(tool_use_id)) is not None:
            return small
        with open(self._path(tool_use_id), "rb") as file:
            head = json.loads(file.readline())
            return Outcome(file.read(), bool(head["is_error"]), head.get("spill_path"))

    def forget(self, tool_use_id: str) -> None:
        """Drop an acknowledged outcome."""
        self._small.pop(tool_use_id, None)
        self._sizes.pop(tool_use_id, None)
        missing = [name for name in map(self._spare, range(SPARES)) if name not in self._spares]
        try:
            if not missing:
                os.unlink(self._path(tool_use_id))
                return
            # Given back where it was taken from: once unlinked, its room is anybody's.
            os.truncate(self._path(tool_use_id), min(SPARE_BYTES, os.path.getsize(self._path(tool_use_id))))
            os.rename(self._path(tool_use_id), missing[0])
            self._spares.append(missing[0])
        except FileNotFoundError:
            return


def _fill(path: str, data: bytes, flags: int) -> None:
    """Write the whole of a file."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.ftruncate(fd, len(data))
    finally:
        os.close(fd)
