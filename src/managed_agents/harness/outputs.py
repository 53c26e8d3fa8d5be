"""What a session leaves in its outputs directory becomes its files, once per content.

While the session works the directory is looked at every second, and what has settled is taken; before a turn ends everything is.
The bytes are stored first, the row is written after: a crash between leaves bytes without a file, which the blob collector
finds, never a file without its bytes. What was stored is what counts: a file may change between looking and reading, and one
that changes while it is read is left for the next look. No odd file, whatever commands put there, keeps another from being taken.
A file that a client deleted is not made again of what is still there: it comes back only with new content.
"""

import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing

import anyio
import anyio.lowlevel

from managed_agents.blobstore.store import BlobRef, BlobStore, BlobStoreFull, BlobTooLarge
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
STORE_FULL = "the blob store is full"
LOOKED_AT_ONCE = 100  # before others of this process have their turn


class Taken:
    """What the session's files take of the bounds on outputs. Asking costs the same however many there are.

    `sizes` (by path) is theirs from now on.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self._bytes = sum(sizes.values())

    def add(self, path: str, size: int) -> None:
        """Count a file, in place of the one that was at its path."""
        self._bytes += size - self._sizes.get(path, 0)
        self._sizes[path] = size

    def refusal(self, path: str, size: int) -> str | None:
        """Why there is no room for a file, whatever its content."""
        if path not in self._sizes and len(self._sizes) >= limits.OUTPUT_FILES_MAX:
            return f"the session has {limits.OUTPUT_FILES_MAX} outputs"
        if self._bytes - self._sizes.get(path, 0) + size > limits.OUTPUT_BYTES_MAX:
            return f"the session's outputs would take more than {limits.OUTPUT_BYTES_MAX} bytes"
        return None


def never(path: str, size: int) -> str | None:
    """Why a file is not taken, however much room there is."""
    if len(path.encode()) > PATH_BYTES_MAX:
        return f"the path is longer than {PATH_BYTES_MAX} bytes"
    if size > limits.FILE_BYTES_MAX:
        return f"a file is larger than {limits.FILE_BYTES_MAX} bytes"
    return None


class Outputs:
    """What of one session's outputs is a file already."""

    def __init__(self, db: Database, blobs: BlobStore, workspace_id: WorkspaceId, session_id: SessionId) -> None:
        self._db, self._blobs = db, blobs
        self._workspace_id, self._session_id = workspace_id, session_id
        self._collecting = anyio.Lock()
        self._known: dict[str, str] | None = None  # path → SHA-256 of what was taken, deleted since or not
        self._taken = Taken({})
        self._refused: Counter[str] = Counter()  # by the last look, for want of room or for good
        self._full = False
        self._no_room_for: int | None = None  # bytes, of the smallest that found none at the last look
        # Of what was looked at and needs no second look while it stays the same: taken, or refused for good.
        self._signatures: dict[str, str] = {}

    async def collect(self, sandbox: Sandbox, *, settled: bool) -> None:
        """Take what is new. `settled`: only what was not written to just now; else everything, as it is.

        Raises: SandboxError, OSError, SQLAlchemyError.
        """
        async with self._collecting:
            first = self._known is None
            if first or self._full:  # deleting a file makes room for another
                await self._load()
            # An owner's first look compares digests, so that what former owners took is not carried over again.
            found = await sandbox.listing(OUTPUTS, digests=first)
            refused: Counter[str] = Counter()
            self._full, self._no_room_for = False, None
            for number, entry in enumerate(found):
                if number % LOOKED_AT_ONCE == 0:
                    await anyio.lowlevel.checkpoint()
                if settled and entry.unchanged_seconds < SETTLED_SECONDS:
                    continue
                if (why := await self._consider(sandbox, entry, changing=not settled)) is not None:
                    refused[why] += 1
            self._signatures = {e.path: self._signatures[e.path] for e in found if e.path in self._signatures}
            if refused and refused != self._refused:
                # Not their names: commands make as many as they like, as long as they like.
                logger.warning("outputs of %s not collected: %s", self._session_id, dict(refused))
            self._refused = refused

    async def _load(self) -> None:
        async with self._db.autocommit() as tx:
            outputs = await bindings.outputs(tx, self._session_id)
        self._known = {output.path: output.sha256 for output in outputs}
        self._taken = Taken({output.path: output.size for output in outputs if not output.deleted})

    async def _consider(self, sandbox: Sandbox, entry: FileEntry, *, changing: bool) -> str | None:
        """Take one file, if it is to be taken; returns why it is not, if that is a matter of bounds."""
        assert self._known is not None
        if entry.signature and self._signatures.get(entry.path) == entry.signature:
            return None
        known = self._known.get(entry.path)
        if known is not None and known == entry.sha256:
            self._signatures[entry.path] = entry.signature
            return None
        if (why := never(entry.path, entry.size)) is not None:
            self._signatures[entry.path] = entry.signature
            return why
        if (why := self._taken.refusal(entry.path, entry.size)) is not None:
            self._full = True
            return why
        if self._no_room_for is not None and entry.size >= self._no_room_for:
            return STORE_FULL
        try:
            blob = await self._store(sandbox, entry, changing=changing)
        except BlobStoreFull:
            # There may be room for what is smaller, and there will be some again for this one.
            self._no_room_for = entry.size
            return STORE_FULL
        except (SandboxGone, LimitHit):
            raise
        except (FileChanging, BlobTooLarge, SandboxError) as error:
            # Gone meanwhile, still written to, or grown beyond what a file may be: the next look tells.
            logger.info("output of %s not collected yet: %s", self._session_id, error)
            return None
        faults.reach(OUTPUT_STORED)
        if known != blob.sha256:
            async with self._db.transaction() as tx:
                await files.add_output(
                    tx, self._workspace_id, self._session_id, output_path=entry.path, mime_type=None, blob=blob
                )
            faults.reach(OUTPUT_RECORDED)
            self._taken.add(entry.path, blob.size)
        self._known[entry.path] = blob.sha256
        self._signatures[entry.path] = entry.signature
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
        async with aclosing(source):
            async for piece in source:
                yield piece
