"""The tar of a snapshot: what a session's directories hold, and putting it back.

Both run in a child with the commands' uid. Names in the archive are the directories' own (`workspace/…`), not where this
sandbox has them, so that any backend can restore it. An archive was made by a process that commands may attack: restoring
one can write only what commands could write, and only below the same directories. Files that change while they are read
are kept at the size they had when they were opened; the archive stays whole.
"""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import stat
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, cast

from . import frames
from .config import Config
from .filetools import open_regular
from .toolerror import ToolError

COPY_BYTES = 1024 * 1024
HOLES_BYTES_MAX = 1024 * 1024 * 1024  # a file with more of them is left out: reading zeros takes the whole time
_ZEROS = bytes(COPY_BYTES)


class _FrameWriter:
    """File object that sends what is written as data frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def write(self, data: bytes) -> int:
        for offset in range(0, len(data), frames.CHUNK_BYTES):
            chunk = data[offset : offset + frames.CHUNK_BYTES]
            self._sock.sendall(frames.encode({"op": "data", "more": True}, chunk))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""


class _FrameReader:
    """File object that reads what data frames carry."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._left = b""
        self._more = True

    def read(self, size: int) -> bytes:
        while not self._left and self._more:
            header, self._left = frames.receive(self._sock)
            self._more = bool(header.get("more"))
        given, self._left = self._left[:size], self._left[size:]
        return given

    def drain(self) -> None:
        """Take what nobody wants, so that the sender is not cut off."""
        while self.read(COPY_BYTES):
            pass


class _Padded:
    """A file that is read at the size it had: zeros where it has shrunk meanwhile."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        return data + bytes(size - len(data))


def _paths(top: str) -> Iterator[str]:
    for directory, names, files in os.walk(top):
        names.sort()
        for name in [*names, *sorted(files)]:
            yield os.path.join(directory, name)


def _add(archive: tarfile.TarFile, path: str, name: str) -> None:
    kind = os.lstat(path).st_mode
    if stat.S_ISREG(kind):
        with os.fdopen(open_regular("snapshot", path, path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size - found.st_blocks * 512 > HOLES_BYTES_MAX:
                return
            info = archive.gettarinfo(arcname=name, fileobj=file)
            archive.addfile(info, cast("IO[bytes]", _Padded(file)))
    elif stat.S_ISDIR(kind) or stat.S_ISLNK(kind):
        archive.add(path, arcname=name, recursive=False)


def snapshot(sock: socket.socket, header: frames.Header, config: Config) -> None:
    """Send a compressed tar of the session's directories, as far as the commands' uid may read them."""
    del header
    os.nice(10)
    sock.sendall(frames.encode({"op": "file", "more": True}))
    writer = cast("IO[bytes]", _FrameWriter(sock))
    with (
        gzip.GzipFile(fileobj=writer, mode="wb", compresslevel=1, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as archive,
    ):
        for name, top in config.snapshot.items():
            for path in _paths(top):
                try:
                    _add(archive, path, name + path[len(top) :])
                except (OSError, ToolError):
                    continue  # deleted meanwhile, or closed to the commands' uid
    sock.sendall(frames.encode({"op": "data"}))


def restore(sock: socket.socket, header: frames.Header, config: Config) -> None:
    """Unpack the archive in the frames that follow. What is there already is kept, unless a file of the archive replaces it."""
    del header
    reader = _FrameReader(sock)
    try:
        with (
            gzip.GzipFile(fileobj=cast("IO[bytes]", reader), mode="rb") as compressed,
            tarfile.open(fileobj=compressed, mode="r|") as archive,
        ):
            _extract(archive, config)
        reader.drain()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        sock.sendall(frames.encode({"op": "error", "code": "bad_archive", "message": f"{type(error).__name__}: {error}"}))
        return
    frames.send_message(sock, {"op": "ok"})


def _extract(archive: tarfile.TarFile, config: Config) -> None:
    directories: list[tuple[str, tarfile.TarInfo]] = []
    for member in archive:
        path = _destination(member.name, config)
        if member.isdir():
            os.makedirs(path, exist_ok=True)
            directories.append((path, member))
            continue
        if os.path.lexists(path):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if member.issym():
            os.symlink(member.linkname, path)
        elif member.islnk():
            os.link(_destination(member.linkname, config), path, follow_symlinks=False)
        elif member.isreg():
            source = archive.extractfile(member)
            assert source is not None, "a regular file has content"
            _write(path, source, member)
    # Last, and from below: one that is closed to writing could not be filled.
    for path, member in reversed(directories):
        os.chmod(path, member.mode & 0o7777)
        os.utime(path, (member.mtime, member.mtime))


def _destination(name: str, config: Config) -> str:
    top, _, inner = name.partition("/")
    if top not in config.snapshot or not inner or ".." in inner.split("/"):
        raise ValueError(f"{name!r} is in no directory of a session")
    return f"{config.snapshot[top]}/{inner}"


def _write(path: str, source: IO[bytes], member: tarfile.TarInfo) -> None:
    with open(path, "xb") as file:
        while data := source.read(COPY_BYTES):
            # A hole stays one: a sparse file may be larger than the disk.
            if data == _ZEROS[: len(data)]:
                file.seek(len(data), os.SEEK_CUR)
            else:
                file.write(data)
        file.truncate(member.size)
        os.fchmod(file.fileno(), member.mode & 0o7777)
    os.utime(path, (member.mtime, member.mtime))
