"""The disk of the sandbox's host: shared with others, and nothing that the session's own bound says is promised of it.

A sized session disk is a file that grows on the host's. What commands write stays in memory at first, and they are told that it
is written; a host without room is met later, by the kernel, which drops what it cannot write. Nobody inside learns of that but
who asks for it: while the host has less room than could be wanted, all that is not written yet is written after each call, and
a loss becomes the call's failure. Where the host has room, asking costs a look at two figures.
"""

from __future__ import annotations

import asyncio
import os

from .config import Config

ROOM_MIN = 4 * 1024 * 1024
SYNC_SECONDS_MAX = 60.0
FULL = "Disk full: the disk of the sandbox's host has no room left. Delete files, or try again later."
LOST = (
    "Disk full: the disk of the sandbox's host has no room left, and some of what was written to the session's files is lost. "
    "Delete files, or try again later; check what was written last."
)


class HostDisk:
    """What is left of it, and what that did to the session's files."""

    def __init__(self, config: Config) -> None:
        self._state = config.state
        # Losses are counted from when it is opened. A directory that commands cannot replace.
        self._fd = os.open(config.root_owned[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if config.own_disk else -1
        self._short = False

    @property
    def full(self) -> bool:
        """Whether next to nothing can be written there."""
        return _room(self._state) < ROOM_MIN

    async def lost(self) -> bool:
        """Whether writes to the session's files were lost, as far as nobody was told yet."""
        if self._fd < 0:
            return False
        room = _room(self._state)
        if not self._short and room > _used(self._fd) + ROOM_MIN:
            return False
        self._short = True
        syncing = asyncio.ensure_future(asyncio.to_thread(_synced, self._fd))
        await asyncio.wait([syncing], timeout=SYNC_SECONDS_MAX)
        if not syncing.done() or isinstance(syncing.exception(), RuntimeError):
            return False  # a slow disk, or no room for a thread: the next call asks again
        if syncing.result():
            self._short = False  # until the figures say otherwise
            return False
        return True


def _room(path: str) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _used(fd: int) -> int:
    found = os.fstatvfs(fd)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _synced(fd: int) -> bool:
    """Write a file system's pending data; False when that failed, now or since it was asked last."""
    import ctypes  # a megabyte of memory that hardly a sandbox needs

    return ctypes.CDLL(None).syncfs(fd) == 0
