"""Blobs as files below one directory.

Layout: `<first two digits>/<sha256>`, drafts in `drafts/`. A blob appears by rename after its bytes are
synced, so a reader finds it whole or not at all. Race: removing a blob while it is being stored again. Both
take a lock on the store's directory (shared to store, exclusive to remove) for the instant of the rename or
unlink, and a removal looks at the time again under it.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Protocol

import anyio
from anyio import to_thread

from managed_agents.blobstore.store import BlobMissing, BlobRef, BlobStoreFull, BlobTooLarge

WRITE_BYTES = 1024 * 1024
READ_BYTES = 256 * 1024
LIST_BATCH = 500
SHA256 = re.compile("[0-9a-f]{64}")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


class LocalBlobStore:
    """The blob store of a single host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._drafts = directory / "drafts"
        self._drafts.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def put(self, stream: AsyncIterable[bytes], size_max: int) -> BlobRef:
        """See `BlobStore.put`."""
        draft = self._drafts / secrets.token_hex(16)
        try:
            return await self._put(draft, stream, size_max)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise BlobStoreFull(error.errno, "the blob store is full") from error
        finally:
            draft.unlink(missing_ok=True)

    async def _put(self, draft: Path, stream: AsyncIterable[bytes], size_max: int) -> BlobRef:
        digest = hashlib.sha256()
        size = 0
        pending: list[bytes] = []
        pending_bytes = 0
        async with await anyio.open_file(draft, "xb", buffering=0) as file:
            async for chunk in stream:
                size += len(chunk)
                if size > size_max:
                    raise BlobTooLarge
                pending.append(chunk)
                pending_bytes += len(chunk)
                if pending_bytes >= WRITE_BYTES:
                    await to_thread.run_sync(_write, file.wrapped, digest, b"".join(pending))
                    pending, pending_bytes = [], 0
            await to_thread.run_sync(_write, file.wrapped, digest, b"".join(pending))
            await to_thread.run_sync(os.fsync, file.wrapped.fileno())
        ref = BlobRef(digest.hexdigest(), size)
        await to_thread.run_sync(self._publish, draft, ref)
        return ref

    async def open(self, ref: BlobRef, range_: tuple[int, int] | None = None) -> AsyncIterator[bytes]:
        """See `BlobStore.open`."""
        start, end = range_ or (0, ref.size)
        try:
            file = await anyio.open_file(self._path(ref), "rb", buffering=0)
        except FileNotFoundError as error:
            raise BlobMissing(ref.sha256) from error
        async with file:
            await file.seek(start)
            while start < end:
                chunk = await file.read(min(READ_BYTES, end - start))
                if not chunk:
                    raise BlobMissing(f"{ref.sha256}: ends after {start} bytes")
                start += len(chunk)
                yield chunk

    async def delete(self, ref: BlobRef, *, put_before: datetime | None = None) -> bool:
        """See `BlobStore.delete`."""
        return await to_thread.run_sync(self._remove, ref, put_before)

    async def list_before(self, instant: datetime) -> AsyncIterator[list[BlobRef]]:
        """See `BlobStore.list_before`."""
        for prefix in range(256):
            refs = await to_thread.run_sync(self._scan, f"{prefix:02x}", instant)
            for first in range(0, len(refs), LIST_BATCH):
                yield refs[first : first + LIST_BATCH]

    async def discard_drafts(self, instant: datetime) -> None:
        """See `BlobStore.discard_drafts`."""
        await to_thread.run_sync(self._discard, instant)

    def _path(self, ref: BlobRef) -> Path:
        assert SHA256.fullmatch(ref.sha256), ref.sha256
        return self._directory / ref.sha256[:2] / ref.sha256

    def _publish(self, draft: Path, ref: BlobRef) -> None:
        path = self._path(ref)
        with self._lock(fcntl.LOCK_SH):
            path.parent.mkdir(exist_ok=True, mode=0o700)
            draft.replace(path)
        _sync_directory(path.parent)
        _sync_directory(self._directory)

    def _remove(self, ref: BlobRef, put_before: datetime | None) -> bool:
        path = self._path(ref)
        with self._lock(fcntl.LOCK_EX):
            try:
                if put_before is not None and _modified(path.stat()) >= put_before:
                    return False
                path.unlink()
            except FileNotFoundError:
                return False
        return True

    def _scan(self, prefix: str, instant: datetime) -> list[BlobRef]:
        try:
            with os.scandir(self._directory / prefix) as entries:
                found = [(entry.name, entry.stat()) for entry in entries]
        except FileNotFoundError:
            return []  # no blob begins so, or one was removed meanwhile: the next round sees the rest
        return [BlobRef(name, stat.st_size) for name, stat in found if _modified(stat) < instant]

    def _discard(self, instant: datetime) -> None:
        for draft in self._drafts.iterdir():
            try:
                if _modified(draft.stat()) < instant:
                    draft.unlink()
            except FileNotFoundError:
                continue  # its writer was faster

    @contextmanager
    def _lock(self, kind: int) -> Generator[None]:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)


def _write(file: IO[bytes], digest: _Digest, data: bytes) -> None:
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _modified(stat: os.stat_result) -> datetime:
    return datetime.fromtimestamp(stat.st_mtime, UTC)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
