"""The sized session disk: a sparse file with a file system of its own, mounted through a loop device.

Needs root. Its directories are bind-mounted into the sandbox; host processes never open paths inside once
commands ran. The kernel frees the loop device when the file system is unmounted, so there is one thing to
undo.
"""

import errno
import logging
import os
import shutil
import subprocess
from pathlib import Path

import anyio

from managed_agents.sandbox.backend import SandboxError

logger = logging.getLogger(__name__)

COMMAND_SECONDS = 60.0
ROOM_MIN = 4 * 1024 * 1024
FULL = "the disk of its host is full"
MOUNT_OPTIONS = "loop,nosuid,nodev,noatime,noinit_itable,discard"


def supported() -> bool:
    """Say whether this process can make sized disks."""
    return os.geteuid() == 0 and shutil.which("mkfs.ext4", path=_path()) is not None


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


async def _run(*command: str) -> None:
    """What is raised reaches the model, which need not know the host's paths; the log has the rest."""
    try:
        with anyio.fail_after(COMMAND_SECONDS):
            await anyio.run_process(command, env={"PATH": _path(), "LC_ALL": "C"})
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip()
        logger.warning("%s failed: %s", " ".join(command), words)
        if os.strerror(errno.ENOSPC) in words:
            raise SandboxError(FULL) from error
        raise SandboxError(f"{command[0]} of its disk failed with status {error.returncode}") from error
    except TimeoutError as error:
        logger.warning("%s took more than %.0f s", " ".join(command), COMMAND_SECONDS)
        raise SandboxError(f"{command[0]} of its disk took more than {COMMAND_SECONDS:.0f} s") from error


def check_room(directory: Path) -> None:
    """Raises: SandboxError, where there is hardly room for another sandbox's own files: the last of it is for those that work."""
    found = os.statvfs(directory)
    if found.f_bavail * found.f_frsize < ROOM_MIN:
        raise SandboxError(FULL)


async def create(image: Path, size_bytes: int) -> None:
    """Make the file and its file system. An unfinished file never bears the final name. Raises: SandboxError."""
    check_room(image.parent)
    partial = image.with_suffix(".part")
    with partial.open("wb") as file:
        file.truncate(size_bytes)
    # Nothing is written ahead: a fresh disk takes a few megabytes of the host, whatever its size. No
    # journal: after a crash of the host the sandbox is restored from its snapshot, not from this file.
    features = ("-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0")
    await _run("mkfs.ext4", "-q", "-F", *features, str(partial))
    partial.rename(image)


async def mount(image: Path, target: Path) -> None:
    """Mount the disk. Repeating is safe."""
    target.mkdir(exist_ok=True)
    if not os.path.ismount(target):
        await _run("mount", "-t", "ext4", "-o", MOUNT_OPTIONS, str(image), str(target))


async def unmount(target: Path) -> None:
    """Unmount the disk. Repeating is safe."""
    if os.path.ismount(target):
        try:
            await _run("umount", str(target))
        except SandboxError:
            # Still busy for a moment after the container's end: detach now, the kernel finishes when the
            # last user goes.
            await _run("umount", "--lazy", str(target))
