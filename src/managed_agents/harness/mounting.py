"""Files mounted into a session, brought into its sandbox.

What a sandbox holds is recorded in its row; its owner compares that with the session's resources before each call. A crash
between doing and recording only makes the next owner do it again.
"""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import anyio

from managed_agents.blobstore.store import BlobMissing, BlobRef, BlobStore
from managed_agents.db.engine import Database
from managed_agents.resources.sessions import bindings
from managed_agents.resources.sessions.bindings import Upload
from managed_agents.sandbox.backend import Sandbox, SandboxError, SandboxGone, SandboxUnreachable

logger = logging.getLogger(__name__)

MOUNT_SECONDS_MAX = 120.0
TOLD_MAX = 5


class Mounts:
    """One session's mounted files, wanted and present. Used under the lock that guards the sandbox's binding."""

    def __init__(self, db: Database, blobs: BlobStore, session_id: str) -> None:
        self._db, self._blobs, self._session_id = db, blobs, session_id
        self._wanted: list[Upload] = []
        self._as_of: int | None = None
        self.present: dict[str, str] = {}
        """Path → SHA-256 of what the sandbox at hand holds."""

    async def wanted(self, as_of: int) -> list[Upload]:
        """Files mounted into the session, read again when `as_of`, the session's `input_seq`, has moved."""
        if self._as_of != as_of:
            async with self._db.autocommit() as tx:
                self._wanted = await bindings.uploads(tx, self._session_id)
            self._as_of = as_of
        return self._wanted

    def found(self, present: Mapping[str, str]) -> None:
        """Another sandbox is at hand, which holds these."""
        self.present = dict(present)

    @property
    def complete(self) -> bool:
        """Whether the sandbox holds what is wanted, and nothing else."""
        return self.present == {upload.path: upload.sha256 for upload in self._wanted}

    async def bring_in_line(self, sandbox: Sandbox) -> str | None:
        """Put and remove files, within a bound. What cannot be done keeps no other file, and no call, from its turn: returned is
        what the model is to be told of it, and the next call tries again.

        Raises: SandboxGone, SandboxUnreachable.
        """
        failed: dict[str, str] = {}
        with anyio.move_on_after(MOUNT_SECONDS_MAX) as scope:
            await self._each(sandbox, failed)
        if scope.cancelled_caught:
            missing = [upload.path for upload in self._wanted if self.present.get(upload.path) != upload.sha256]
            failed |= {path: "it took too long" for path in missing if path not in failed}
        if not failed:
            return None
        logger.warning("files of %s not mounted: %d, the first: %s", self._session_id, len(failed), next(iter(failed.values())))
        shown = "; ".join(f"{path} ({why})" for path, why in [*failed.items()][:TOLD_MAX])
        more = f"; and {len(failed) - TOLD_MAX} more" if len(failed) > TOLD_MAX else ""
        return f"[Mounted files are not up to date: {shown}{more}.]"

    async def _each(self, sandbox: Sandbox, failed: dict[str, str]) -> None:
        wanted = {upload.path: upload for upload in self._wanted}
        for path in [path for path in self.present if path not in wanted]:
            with _noting(failed, path):
                await sandbox.remove(path)
                del self.present[path]
        for path, upload in wanted.items():
            if self.present.get(path) != upload.sha256:
                source = self._blobs.open(BlobRef(upload.sha256, upload.size))
                with _noting(failed, path):
                    await sandbox.put(path, source, "root", 0o444)
                    self.present[path] = upload.sha256


@contextmanager
def _noting(failed: dict[str, str], path: str) -> Generator[None]:
    try:
        yield
    except (SandboxGone, SandboxUnreachable):
        raise
    except (SandboxError, OSError, BlobMissing) as error:
        failed[path] = reason(error)


def reason(error: Exception) -> str:
    """In words for the model, which need not know the host's paths."""
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
