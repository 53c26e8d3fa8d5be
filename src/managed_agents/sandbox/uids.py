"""Uids of commands: no two sandboxes of a host have the same one, so they share no bound that the kernel counts by uid, nor any
file or process that one of them might reach after all.

A link per uid in use names the sandbox's directory. It is free once that directory is gone, which is what removing a sandbox
ends with: nothing has to be given back. Race: several processes take one at once; a lock on a file lets in one. Sandboxes that
releases before this made have no link, and the uid that was computed from their id, which is left to them.
"""

import fcntl
import os
import zlib
from pathlib import Path

from managed_agents.sandbox import layout
from managed_agents.sandbox.backend import SandboxError

COUNT = layout.UIDS


def take(data_dir: Path, home: Path) -> int:
    """Return the number, counted from the first uid, of one that no other sandbox below `data_dir` has.

    `home` is the directory of the sandbox that gets it, and there already; asking again returns another one.

    Raises: SandboxError.
    """
    slots = data_dir / "slots"
    slots.mkdir(parents=True, exist_ok=True)
    fd = os.open(slots / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # held for some system calls only
        taken = _taken(slots, home)
        first = _of_older_releases(home)
        for offset in range(COUNT):
            number = (first + offset) % COUNT
            if number not in taken:
                (slots / str(number)).unlink(missing_ok=True)  # of a sandbox that was removed
                (slots / str(number)).symlink_to(home.name)
                return number
    finally:
        os.close(fd)
    raise SandboxError(f"all {COUNT} uids are taken")


def _taken(slots: Path, home: Path) -> set[int]:
    links = {int(path.name): home.with_name(path.readlink().name) for path in slots.iterdir() if path.name.isdigit()}
    used = {number for number, target in links.items() if target.exists()}
    named = {*links.values(), home}
    older = (each for each in home.parent.iterdir() if each.is_dir() and each not in named)
    return used | {_of_older_releases(each) for each in older}


def _of_older_releases(home: Path) -> int:
    return zlib.crc32(home.name.rpartition(".")[0].encode()) % COUNT
