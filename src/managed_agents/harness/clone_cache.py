"""Cached clones, on their way into a session's sandbox and out of it.

What is put into a sandbox goes there once the host has said that this session, with its own token, may read the repository. What
is taken out is a clone's pack and names as they were when the cloning call ended: the call says their digest, the sandbox's
runner keeps what it says where commands cannot reach, and bytes of another digest are not recorded. Invariant: nothing that ran
at the model's will has a part in what is recorded: no call was sent to any sandbox of the session before (`clones.pristine`).

Every trouble in here only costs a transfer: the session clones from the host, or the next one does.
"""

import hashlib
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import anyio
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.blobstore.store import BlobMissing, BlobStore, BlobTooLarge
from managed_agents.core import faults, limits
from managed_agents.db.engine import Database
from managed_agents.harness.clone_script import BUNDLE_HEADER, NAMED, Kept
from managed_agents.resources.sessions import clones
from managed_agents.resources.sessions.clones import CachedClone, CloneKey
from managed_agents.resources.sessions.repositories import Repository
from managed_agents.sandbox.backend import FileChanging, Sandbox, SandboxError, SandboxGone, StaleEpoch

logger = logging.getLogger(__name__)

STORED = faults.register("clone.stored", "clone of a repository in the blob store, not recorded")
RECORDED = faults.register("clone.recorded", "clone of a repository recorded for later sessions")
KEEPING_AT_ONCE = 2  # of one worker; a session's own turn goes before


@dataclass(frozen=True, slots=True)
class CloneCache:
    """`bytes_max` is a workspace's, 0: there are no cached clones. `keeping` is shared by a worker's sessions."""

    db: Database
    blobs: BlobStore
    bytes_max: int
    keeping: anyio.CapacityLimiter

    async def key(self, session_id: str, workspace_id: str, repository: Repository) -> CloneKey | None:
        """Where the repository's clone may be looked for and kept; None when this session's is not to be trusted with either."""
        if self.bytes_max == 0:
            return None
        async with self.db.autocommit() as tx:
            return clones.key_of(workspace_id, repository) if await clones.pristine(tx, session_id) else None

    async def use(self, key: CloneKey) -> CachedClone | None:
        """The cached clone, when there is one."""
        async with self.db.autocommit() as tx:
            return await clones.use(tx, key)

    async def drop(self, key: CloneKey, cached: CachedClone) -> None:
        """Forget a clone that was of no use."""
        logger.warning("the cached clone of %s was of no use: cloned from its host", key.url)
        async with self.db.autocommit() as tx:
            await clones.drop(tx, key, cached.blob)

    async def put(self, sandbox: Sandbox, path: str, key: CloneKey, cached: CachedClone) -> bool:
        """Write the bundle into the sandbox; says whether it is there.

        Raises: SandboxGone, StaleEpoch.
        """
        try:
            with anyio.fail_after(limits.CLONE_TRANSFER_SECONDS_MAX):
                await sandbox.put(path, self.blobs.open(cached.blob), "agent", 0o600)
        except (SandboxGone, StaleEpoch):
            raise
        except BlobMissing:
            await self.drop(key, cached)
            return False
        except (SandboxError, OSError, TimeoutError) as error:
            logger.warning("cached clone of %s not used: %s: %s", key.url, type(error).__name__, error)
            return False
        return True

    async def keep(self, sandbox: Sandbox, repository: Repository, key: CloneKey, kept: Kept) -> None:
        """Store and record what a sandbox's clone consists of. Best effort; cancelling leaves nothing behind."""
        try:
            async with self.keeping:
                with anyio.fail_after(limits.CLONE_TRANSFER_SECONDS_MAX):
                    async with aclosing(_bundle(sandbox, repository, kept)) as bundle:
                        blob = await self.blobs.put(bundle, limits.CLONE_BYTES_MAX)
                faults.reach(STORED)
                async with self.db.transaction() as tx:
                    await clones.record(tx, key, blob, bytes_max=self.bytes_max)
                faults.reach(RECORDED)
        except (SandboxError, BlobTooLarge, OSError, TimeoutError, SQLAlchemyError) as error:
            # Commands may have packed it anew by now, or deleted it.
            logger.info("clone of %s not kept: %s: %s", repository.url, type(error).__name__, error)


async def _bundle(sandbox: Sandbox, repository: Repository, kept: Kept) -> AsyncGenerator[bytes]:
    """A git bundle of the clone's remote branches and tags, of the very digest that the cloning script computed.

    Raises: SandboxError, BlobTooLarge; FileChanging at the end when the clone has changed since, so that nothing of it is stored.
    """
    digest = hashlib.sha256()
    git = f"{repository.path}/.git"
    packed = bytearray()
    async for chunk in sandbox.take(git, "packed-refs"):
        packed += chunk
        if len(packed) > limits.CLONE_REFS_BYTES_MAX:
            raise BlobTooLarge
    head = BUNDLE_HEADER + b"".join(line for line in packed.splitlines(keepends=True) if NAMED.match(line)) + b"\n"
    digest.update(head)
    yield head
    async for chunk in sandbox.take(git, f"objects/pack/{kept.pack}"):
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != kept.sha256:
        raise FileChanging("the clone has changed since it was made")
