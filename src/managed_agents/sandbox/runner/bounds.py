"""Says which bound of the sandbox a call ran into: the kernel only says that something failed.

The kernel counts what it killed for memory and the processes it refused; a full disk is seen by looking. A call that ended
while one of these moved gets a line about it. Calls that run at the same time share the counters, so the line speaks of the
sandbox, not of the command. Files are read as uid 0, but none whose path a command could have made.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from . import host_disk
from .config import Config
from .host_disk import HostDisk

_CGROUP = "/sys/fs/cgroup"
# Both hierarchies, the newer first.
_KILLS = (("memory.events", "oom_kill"), ("memory/memory.oom_control", "oom_kill"))
_REFUSALS = (("pids.events", "max"), ("pids/pids.events", "max"))
_ROOM_MIN = 256 * 1024
_INODES_MIN = 8
_OPEN_FILES = re.compile(rb"[Tt]oo many open files|EMFILE")


@dataclass(frozen=True)
class Reading:
    """Counters at one moment; None where the sandbox has no such counter."""

    kills: int | None
    refusals: int | None


class Bounds:
    """The sandbox's bounds and what was counted against them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._host_disk = HostDisk(config)
        self._kills = _Counter(_KILLS if config.own_cgroup else ())
        self._refusals = _Counter(_REFUSALS if config.own_cgroup else ())

    def read(self) -> Reading:
        """Read the counters."""
        return Reading(self._kills.read(), self._refusals.read())

    async def lost(self) -> bool:
        """Whether the session's files lost what was written to them: the call that learns of it has failed."""
        return await self._host_disk.lost()

    def hit(self, before: Reading, output: bytes = b"", *, failed: bool = True, lost: bool = False) -> list[str]:
        """Return a line for each bound that was run into since `before`; `output` is the end of what the call said."""
        after, limits = self.read(), self._config.limits
        lines: list[str] = []
        if _rose(before.kills, after.kills):
            lines.append(f"Memory limit reached: the sandbox has {_size(limits.get('memory_bytes'))}. A process was killed.")
        if _rose(before.refusals, after.refusals):
            lines.append(f"Process limit reached: the sandbox may have {limits.get('pids')} processes and threads.")
        if lost or (failed and self._host_disk.full):
            lines.append(host_disk.LOST if lost else host_disk.FULL)
        if failed and self._full():
            lines.append(
                f"Disk full: the session's disk has {_size(limits.get('disk_bytes'))}. Delete files before writing more."
            )
        if failed and _OPEN_FILES.search(output):
            lines.append(f"Open files limit reached: a process may have {limits.get('open_files')} open.")
        return lines

    def _full(self) -> bool:
        # A disk of unknown size is not the session's own: the quota speaks of it.
        if not self._config.own_disk:
            return False
        try:
            found = os.statvfs(self._config.workspace)
        except OSError:
            return False
        return found.f_bavail * found.f_frsize < _ROOM_MIN or found.f_favail < _INODES_MIN


def _rose(before: int | None, after: int | None) -> bool:
    return before is not None and after is not None and after > before


class _Counter:
    """One figure of one of the kernel's files, kept open: it is read around every call."""

    def __init__(self, places: tuple[tuple[str, str], ...]) -> None:
        self._fd = -1
        for path, name in places:
            try:
                self._fd = os.open(f"{_CGROUP}/{path}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # the other hierarchy, or a sandbox without
            self._line = re.compile(rb"^%s (\d+)$" % name.encode(), re.MULTILINE)
            break

    def read(self) -> int | None:
        if self._fd < 0:
            return None
        try:
            found = self._line.search(os.pread(self._fd, 4096, 0))
        except OSError:
            return None
        return None if found is None else int(found[1])


def _size(count: float | None) -> str:
    if count is None:
        return "no more"
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} bytes"
