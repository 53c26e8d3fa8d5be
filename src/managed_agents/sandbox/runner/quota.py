"""The polled quota of a session disk that the host could not size.

A volume grows as long as the engine's disk does. Where there is no sized disk the runner measures, every
few seconds while calls run, what the session's directories take. A command that runs over the bound is
ended; until there is room again `write` and `put` are refused, while `bash` stays possible so that the
model can delete files. Weaker than a real bound: a command may overshoot by what it writes between two
looks, and files that are deleted but open are not seen. An idle sandbox is not measured.
"""

from __future__ import annotations

import asyncio
import errno
import os

from .children import ChildFailed, Children
from .config import Config

LOOK_SECONDS_MIN = 0.5
LOOK_SHARE = 0.1  # of the time, at most, is spent on looking
MEASURE_SECONDS_MAX = 60.0
# What one call may add over the bound: deleting files is work that leaves traces (a log, a directory's blocks, the
# shell's own state), and a file's blocks are counted a moment after they were written.
FREEING_BYTES = 256 * 1024


class Quota:
    """What the session's directories may take and take."""

    def __init__(self, config: Config, children: Children) -> None:
        self.bytes_max = config.quota_bytes
        self._children = children
        self._used = 0
        self._looking: asyncio.Future[int] | None = None

    async def _measure(self) -> int:
        """Return the bytes taken; what was known when they cannot be measured now."""
        request = {"op": "usage", "seconds": MEASURE_SECONDS_MAX}
        try:
            async with self._children.open(request) as channel:
                answer = asyncio.ensure_future(channel.receive())
                try:
                    await asyncio.wait([answer], timeout=MEASURE_SECONDS_MAX)
                    if answer.done():
                        # The child is the commands' own uid: it may lie about its quota, not break us.
                        taken = answer.result()[0].get("bytes")
                        self._used = taken if isinstance(taken, int) else self._used
                finally:
                    answer.cancel()
        except (ChildFailed, OSError):
            return self._used
        return self._used

    async def exceeded(self) -> None:
        """Return when what runs has run over the bound. What is over it already may go on as long as it adds next to nothing."""
        if self.bytes_max is None:
            await asyncio.Event().wait()
        lowest = self._used
        clock = asyncio.get_running_loop().time
        pause = LOOK_SECONDS_MIN
        while True:
            await asyncio.sleep(pause)
            begun = clock()
            used = await self._measure()
            pause = max(LOOK_SECONDS_MIN, (clock() - begun) / LOOK_SHARE)
            if self.bytes_max is not None and used > max(self.bytes_max, lowest + FREEING_BYTES):
                return
            lowest = min(lowest, used)

    async def check(self) -> None:
        """Raises: OSError (EDQUOT) when there is no room to write."""
        if self.bytes_max is None or self._used <= self.bytes_max:
            return
        if await self._measure() > self.bytes_max:
            raise OSError(errno.EDQUOT, self.words)

    def look(self) -> None:
        """Measure in the background, for the calls that follow."""
        if self.bytes_max is not None and (self._looking is None or self._looking.done()):
            self._looking = asyncio.ensure_future(self._measure())

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    @property
    def words(self) -> str:
        """What the model is told."""
        return (
            f"Disk quota exceeded: the session's files take {self._used} of {self.bytes_max} bytes. "
            "Delete files before writing more."
        )


def usage(roots: list[str]) -> int:
    """Return the bytes that files below `roots` take on their disks, as far as the caller may look."""
    total = 0
    seen: set[tuple[int, int]] = set()
    pending = list(roots)
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif found.st_nlink > 1:
                        if (found.st_dev, found.st_ino) in seen:
                            continue
                        seen.add((found.st_dev, found.st_ino))
                    total += found.st_blocks * 512
        except OSError:
            continue  # gone meanwhile, or closed to the commands' uid
    return total
