"""A directory on a disk of its own, so small that a test can fill it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

MIB = 1024 * 1024
CHUNK_BYTES = (65536, 4096)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})


@contextmanager
def small_disk(mebibytes: int, kind: Literal["tmpfs", "ext4"] = "tmpfs") -> Iterator[Path]:
    """Mount one while the block runs. `ext4` also runs out of room for directories, as real disks do."""
    # Short, because sockets are made below it.
    directory = Path(tempfile.mkdtemp(prefix="md", dir="/tmp"))
    image = directory.with_suffix(".img")
    try:
        if kind == "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=755", "tmpfs", str(directory))
        else:
            with image.open("wb") as file:
                file.truncate(mebibytes * MIB)
            _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
            _run("mount", "-o", "loop", str(image), str(directory))
            directory.chmod(0o755)
        try:
            yield directory
        finally:
            _run("umount", "--lazy", str(directory))
    finally:
        image.unlink(missing_ok=True)
        shutil.rmtree(directory)


def fill(disk: Path) -> Path:
    """Leave no room at all; removing the file that is returned makes it again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in CHUNK_BYTES:
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler
