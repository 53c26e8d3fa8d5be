"""What a session leaves in its outputs directory becomes its files, once per content.

While the session works the directory is looked at every second, and what has settled is taken; before a turn ends everything is.
The bytes are stored first, the row is written after: a crash between leaves bytes without a file, which the blob collector
finds, never a file without its bytes. What was stored is what counts: a file may change between looking and reading, and one
that changes while it is read is left for the next look. No odd file, whatever commands put there, keeps another from being taken.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import anyio

from managed_agents.blobstore.store import BlobRef, BlobStore, BlobTooLarge
from managed_agents.core import faults, limits
from managed_agents.core.ids import SessionId, WorkspaceId
from managed_agents.db.engine import Database
from managed_agents.resources.files import service as files
from managed_agents.resources.sessions import bindings
from managed_agents.sandbox.backend import FileChanging, FileEntry, LimitHit, Sandbox, SandboxError, SandboxGone

logger = logging.getLogger(__name__)

OUTPUT_STORED = faults.register("hands.output_stored", "bytes of an output stored, no file refers to them")
OUTPUT_RECORDED = faults.register("hands.output_recorded", "output is a file, turn not over in the log")
OUTPUTS = "/mnt/session/outputs"
HARVEST_SECONDS_MAX = 30.0
LOOK_SECONDS = 1.0
# A file's times come in steps of some milliseconds: one that was written to just now may be written to again unseen.
SETTLED_SECONDS = 0.3
PATH_BYTES_MAX = 1024
CHANGING_TRIES = 3


class Outputs:
    """What of one session's outputs is a file already."""

    def __init__(self, db: Database, blobs: BlobStore, workspace_id: WorkspaceId, session_id: SessionId) -> None:
        self._db, self._blobs = db, blobs
        self._workspace_id, self._session_id = workspace_id, session_id
        self._collecting = anyio.Lock()
        self._files: dict[str, BlobRef] | None = None
        # Of what was looked at and needs no second look while it stays the same: taken, or refused.
        self._signatures: dict[str, str] = {}

    async def collect(self, sandbox: Sandbox, *, settled: bool) -> None:
        """Take what is new. `settled`: only what was not written to just now; else everything, as it is.

        Raises: SandboxError, OSError, SQLAlchemyError.
        """
        async with self._collecting:
            first = self._files is None
            if first:
                async with self._db.autocommit() as tx:
                    self._files = await bindings.outputs(tx, self._session_id)
            # An owner's first look compares digests, so that what former owners took is not carried over again.
            for entry in await sandbox.listing(OUTPUTS, digests=first):
                if not (settled and entry.unchanged_seconds < SETTLED_SECONDS):
                    await self._consider(sandbox, entry, changing=not settled)

    async def _consider(self, sandbox: Sandbox, entry: FileEntry, *, changing: bool) -> None:
        assert self._files is not None
        if entry.signature and self._signatures.get(entry.path) == entry.signature:
            return
        known = self._files.get(entry.path)
        if known is not None and known.sha256 == entry.sha256:
            self._signatures[entry.path] = entry.signature
            return
        if (why := self._refusal(entry)) is not None:
            self._signatures[entry.path] = entry.signature
            logger.warning("output of %s not collected: %s: %r", self._session_id, why, entry.path[:200])
            return
        try:
            blob = await self._store(sandbox, entry, changing=changing)
        except (SandboxGone, LimitHit):
            raise
        except (FileChanging, BlobTooLarge, SandboxError) as error:
            # Gone meanwhile, still written to, or grown beyond what a file may be: the next look tells.
            logger.info("output of %s not collected yet: %s", self._session_id, error)
            return
        faults.reach(OUTPUT_STORED)
        if known is None or known.sha256 != blob.sha256:
            async with self._db.transaction() as tx:
                await files.add_output(
                    tx, self._workspace_id, self._session_id, output_path=entry.path, mime_type=None, blob=blob
                )
            faults.reach(OUTPUT_RECORDED)
        self._files[entry.path] = blob
        self._signatures[entry.path] = entry.signature

    def _refusal(self, entry: FileEntry) -> str | None:
        """Why a file is not taken, whatever its content."""
        assert self._files is not None
        others = sum(blob.size for path, blob in self._files.items() if path != entry.path)
        if len(entry.path.encode()) > PATH_BYTES_MAX:
            return f"its path is longer than {PATH_BYTES_MAX} bytes"
        if entry.size > limits.FILE_BYTES_MAX:
            return f"it is larger than {limits.FILE_BYTES_MAX} bytes"
        if entry.path not in self._files and len(self._files) >= limits.OUTPUT_FILES_MAX:
            return f"the session has {limits.OUTPUT_FILES_MAX} outputs"
        if others + entry.size > limits.OUTPUT_BYTES_MAX:
            return f"the session's outputs would take more than {limits.OUTPUT_BYTES_MAX} bytes"
        return None

    async def _store(self, sandbox: Sandbox, entry: FileEntry, *, changing: bool) -> BlobRef:
        """Store what the file holds now. With `changing` one that does not come to rest is taken as far as it went.

        Raises: FileChanging, BlobTooLarge, SandboxError, OSError.
        """
        last = CHANGING_TRIES - 1 if changing else 0
        for attempt in range(last + 1):
            try:
                async with aclosing(self._read(sandbox, entry, changing=changing and attempt == last)) as source:
                    return await self._blobs.put(source, limits.FILE_BYTES_MAX)
            except FileChanging:
                if attempt == last:
                    raise
        raise AssertionError

    async def _read(self, sandbox: Sandbox, entry: FileEntry, *, changing: bool) -> AsyncGenerator[bytes]:
        # A sandbox whose runner is of an older release does not know how to take.
        source = (
            sandbox.take(OUTPUTS, entry.path, changing=changing) if entry.signature else sandbox.get(f"{OUTPUTS}/{entry.path}")
        )
        async for piece in source:
            yield piece
