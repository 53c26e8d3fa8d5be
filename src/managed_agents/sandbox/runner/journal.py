"""The runner's memory across restarts of the same sandbox: calls begun, outcomes not yet acknowledged,
highest epoch.

One file a call, in a directory only uid 0 can read, on a disk the commands cannot fill. A file says
`running` from before the call starts until its outcome replaces it by rename. Found at start, `running`
means the runner died in the midst: the call gets an error outcome and is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OUTCOMES_MAX = 1_000
OUTCOME_BYTES_MAX = 256 * 1024 * 1024
MEMORY_BYTES_MAX = 64 * 1024
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

    @property
    def epoch(self) -> int:
        return self._epoch

    def raise_epoch(self, epoch: int) -> None:
        """Remember a higher epoch."""
        self._write(self._epoch_file, str(epoch).encode())
        self._epoch = epoch

    @property
    def full(self) -> bool:
        return len(self._sizes) >= OUTCOMES_MAX or sum(self._sizes.values()) >= OUTCOME_BYTES_MAX

    def _path(self, tool_use_id: str) -> str:
        return os.path.join(self._directory, hashlib.sha256(tool_use_id.encode()).hexdigest()[:40] + ".call")

    def _write(self, path: str, data: bytes) -> None:
        partial = path + ".part"
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
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
            self._write(self._path(tool_use_id), json.dumps(head).encode() + b"\n" + outcome.content)
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
        try:
            os.unlink(self._path(tool_use_id))
        except FileNotFoundError:
            return
