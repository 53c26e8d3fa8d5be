"""Bytes in and out: put, get and listing.

Everything here but `root_sink` runs in a child with the commands' uid, because the paths are the model's.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator

from . import archive, frames
from .config import Config
from .filetools import open_regular
from .quota import usage
from .search import walk
from .toolerror import ToolError, reason

LISTING_FILES_MAX = 10_000
# A sparse file costs nothing and takes hours to read: what is larger, or too much together, is listed without a digest.
DIGEST_BYTES_MAX = 512 * 1024 * 1024
DIGESTS_BYTES_MAX = 2 * 1024 * 1024 * 1024
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Sink:
    """Where a `put` writes: a hidden neighbour that gets its name when complete."""

    def __init__(self, directory: int, name: str, mode: int) -> None:
        self._directory, self._name, self._mode = directory, name, mode
        # Not made of the name, which may have as many bytes as a name can have.
        self._partial = f".put-{os.urandom(8).hex()}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._partial, flags, 0o600, dir_fd=directory)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> None:
        """Give the file its name. One that cannot have it is removed. Raises: OSError."""
        try:
            os.fchmod(self._fd, self._mode)
            os.rename(self._partial, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            self.abandon()
            raise
        os.close(self._fd)
        os.close(self._directory)

    def abandon(self) -> None:
        """Remove what was written."""
        os.close(self._fd)
        try:
            os.unlink(self._partial, dir_fd=self._directory)
        finally:
            os.close(self._directory)


def root_sink(path: str, mode: int, roots: list[str]) -> Sink:
    """Open a sink as uid 0; parents are created."""
    directory, name = _root_directory("put", path, roots, create=True)
    try:
        return Sink(directory, name, mode)
    except OSError:
        os.close(directory)
        raise


def root_remove(path: str, roots: list[str]) -> None:
    """Remove a file of uid 0, and the directories that are empty without it: a file may be wanted where they were. What is not
    there is removed already.
    """
    root = next((root for root in roots if path.startswith(root + "/")), "")
    _remove_at("remove", path, roots, os.unlink)
    above = os.path.dirname(path.rstrip("/"))
    while len(above) > len(root):
        try:
            _remove_at("remove", above, roots, os.rmdir)
        except OSError:
            return  # not empty
        above = os.path.dirname(above)


def _remove_at(operation: str, path: str, roots: list[str], remove: Callable[..., None]) -> None:
    try:
        directory, name = _root_directory(operation, path, roots, create=False)
    except FileNotFoundError:
        return
    try:
        remove(name, dir_fd=directory)
    except FileNotFoundError:
        return
    finally:
        os.close(directory)


def _root_directory(operation: str, path: str, roots: list[str], *, create: bool) -> tuple[int, str]:
    """Open the directory of `path` as uid 0, and say the name in it. Every directory on the way must be uid 0's and
    closed to others' writes, none a link.
    """
    root = next((root for root in roots if path.startswith(root + "/")), None)
    parts = [part for part in path[len(root or "") :].split("/") if part]
    if root is None or not parts or ".." in parts or "." in parts or "\0" in path:
        raise ToolError(f"{operation}: files of root belong below {', '.join(roots)}, not in {path}")
    directory = os.open(root, _OPEN_DIRECTORY)
    try:
        for part in parts[:-1]:
            try:
                below = os.open(part, _OPEN_DIRECTORY, dir_fd=directory)
            except FileNotFoundError:
                if not create:
                    raise
                os.mkdir(part, 0o755, dir_fd=directory)
                below = os.open(part, _OPEN_DIRECTORY, dir_fd=directory)
                os.fchmod(below, 0o755)  # our umask closed it to the commands, who are to read what is in it
            os.close(directory)
            directory = below
            found = os.fstat(directory)
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise ToolError(f"{operation}: {part} in {path} can be changed by commands")
    except (OSError, ToolError):
        os.close(directory)
        raise
    return directory, parts[-1]


def agent_sink(path: str, mode: int) -> Sink:
    """Open a sink as the commands' uid; parents are created."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return Sink(os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY), os.path.basename(path), mode)


def put(sock: socket.socket, header: frames.Header, config: Config) -> None:
    """Write the frames that follow to a file. Answers `ok` or an error."""
    sink = agent_sink(config.resolve(str(header["path"])), int(header["mode"]))
    try:
        while True:
            frame, body = frames.receive(sock)
            sink.write(body)
            if not frame.get("more"):
                break
    except (OSError, frames.FrameError):
        sink.abandon()
        raise
    sink.finish()
    frames.send_message(sock, {"op": "ok"})


def append(sock: socket.socket, header: frames.Header, config: Config) -> None:
    """Write a spilled output: visible from the start, so that what there is survives a crash."""
    path = config.resolve(str(header["path"]))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        while True:
            frame, body = frames.receive(sock)
            file.write(body)
            if not frame.get("more"):
                break
    frames.send_message(sock, {"op": "ok"})


def get(sock: socket.socket, header: frames.Header, config: Config) -> None:
    """Send a file's bytes as data frames after a header with its size."""
    path = str(header["path"])
    with os.fdopen(open_regular("get", path, config.resolve(path), os.O_RDONLY), "rb") as file:
        first: frames.Header = {"op": "file", "size": os.fstat(file.fileno()).st_size, "more": True}
        sock.sendall(frames.encode(first))
        while chunk := file.read(frames.CHUNK_BYTES):
            sock.sendall(frames.encode({"op": "data", "more": True}, chunk))
    sock.sendall(frames.encode({"op": "data"}))


def take(sock: socket.socket, header: frames.Header, config: Config) -> None:
    """Send a file below a directory as it is at one moment: links on the way are refused, and so is a file that is written to
    meanwhile, unless `changing` says that this is no matter. What is written behind its size at opening is not read.
    """
    shown = str(header["path"])
    with os.fdopen(_open_below(config.resolve(str(header["root"])), shown), "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        sock.sendall(frames.encode({"op": "file", "size": before.st_size, "more": True}))
        left = before.st_size
        while left and (chunk := file.read(min(left, frames.CHUNK_BYTES))):
            left -= len(chunk)
            sock.sendall(frames.encode({"op": "data", "more": True}, chunk))
        if not header.get("changing") and signature(os.fstat(file.fileno())) != signature(before):
            sock.sendall(frames.encode({"op": "error", "code": "changed", "message": f"{shown} changed while it was read"}))
            return
    sock.sendall(frames.encode({"op": "data"}))


def _open_below(root: str, path: str) -> int:
    """Open a regular file below a directory, no link followed on the way."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ToolError(f"take: {path} is no path below a directory")
    directory = os.open(root, _OPEN_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, _OPEN_DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = below
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(parts[-1], flags, dir_fd=directory)
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ToolError(f"take: {path}: not a regular file")
    return fd


def signature(found: os.stat_result) -> str:
    """What differs once a file was written to. The change time is the kernel's: commands cannot set it back."""
    return f"{found.st_size}.{found.st_mtime_ns}.{found.st_ctime_ns}.{found.st_ino}"


def _digest(path: str, size: int) -> str:
    """Digest a file as far as it went: one that grows as it is read must not hold us."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular("listing", path, path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while size and (chunk := file.read(min(size, 1 << 20))):
            size -= len(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def _entries(root: str, *, digests: bool) -> Iterator[dict[str, object]]:
    budget = DIGESTS_BYTES_MAX
    for path, found in walk(root, skip_git=False):
        try:
            digest = ""
            if digests and found.st_size <= min(budget, DIGEST_BYTES_MAX):
                budget -= found.st_size
                digest = _digest(path, found.st_size)
        except (OSError, ToolError):
            continue  # gone or unreadable: not something that can be harvested
        relative = os.path.relpath(path, root)
        if not _is_text(relative) or not os.access(path, os.R_OK):
            continue
        yield {
            "path": relative,
            "size": found.st_size,
            "mtime": found.st_mtime,
            "sha256": digest,
            "signature": signature(found),
            "unchanged_seconds": max(0.0, time.time() - found.st_ctime),
        }


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False  # bytes that are no UTF-8: no JSON can name it
    return True


def listing(sock: socket.socket, header: frames.Header, config: Config) -> None:
    """Send the regular files below a directory."""
    root = config.resolve(str(header["path"]))
    entries: list[dict[str, object]] = []
    for entry in _entries(root, digests=bool(header.get("digests", True))):
        entries.append(entry)
        if len(entries) == LISTING_FILES_MAX:
            break
    frames.send_message(sock, {"op": "listing"}, json.dumps(entries).encode())


def measure(sock: socket.socket, header: frames.Header, config: Config) -> None:
    """Send what the session's directories take."""
    del header
    os.nice(10)
    frames.send_message(sock, {"op": "usage", "bytes": usage([config.resolve(root) for root in config.quota_roots])})


OPERATIONS: dict[str, Callable[[socket.socket, frames.Header, Config], None]] = {
    "put": put,
    "append": append,
    "get": get,
    "take": take,
    "listing": listing,
    "snapshot": archive.snapshot,
    "restore": archive.restore,
    "usage": measure,
}


def error_header(error: Exception) -> frames.Header:
    """Return the frame that reports a failed transfer."""
    if isinstance(error, ToolError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError):
        code = "limit_disk" if error.errno in (28, 122) else "not_found" if error.errno == 2 else "failed"
        return {
            "op": "error",
            "code": code,
            "message": f"{error.filename or ''}: {reason(error)}".lstrip(": "),
        }
    return {"op": "error", "code": "failed", "message": str(error)}
