"""Snapshots of sandboxes: one row a session, its bytes in the blob store, only the newest kept.

A snapshot is stored before its row is written; the blob collector spares it meanwhile. Race: an owner that lost its session
may be late with one. A row is written only for the newest generation of the session's sandboxes, and a superseded one's bytes
are collected because no row names them any more. State lives at most `limits.SANDBOX_STATE_SECONDS` from its beginning, however
often it is used or restored (spec: observed hosted behaviour).
"""

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, select, text

from managed_agents.blobstore.store import BlobRef, BlobStore
from managed_agents.core import faults, limits
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.sessions.tables import SandboxSnapshotRow
from managed_agents.sandbox.backend import Sandbox

STORED = faults.register("snapshot.stored", "snapshot in the blob store, not recorded")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The newest snapshot of a session."""

    blob: BlobRef
    generation: int
    taken_at: datetime


_RECORD = text("""
    INSERT INTO sandbox_snapshots (session_id, generation, sha256, size_bytes, since, taken_at)
    SELECT b.session_id, b.generation, :sha256, :size, b.since, clock_timestamp() - make_interval(secs => :age)
    FROM sandboxes b JOIN sessions s ON s.id = b.session_id
    WHERE b.id = :sandbox_id AND b.state <> 'destroyed' AND s.deleted_at IS NULL AND s.archived_at IS NULL
      AND NOT EXISTS (SELECT 1 FROM sandboxes n WHERE n.session_id = b.session_id AND n.generation > b.generation)
    ON CONFLICT (session_id) DO UPDATE SET generation = excluded.generation, sha256 = excluded.sha256,
        size_bytes = excluded.size_bytes, since = excluded.since, taken_at = excluded.taken_at
    WHERE sandbox_snapshots.generation < excluded.generation OR sandbox_snapshots.taken_at <= excluded.taken_at
""")
_LATEST = text("""
    SELECT sha256, size_bytes, generation, taken_at FROM sandbox_snapshots
    WHERE session_id = :session_id AND since > clock_timestamp() - make_interval(secs => :kept)
""")
_DROP = text("DELETE FROM sandbox_snapshots WHERE session_id = :session_id AND sha256 = :sha256")
_EXPIRE = text("""
    DELETE FROM sandbox_snapshots n WHERE since <= clock_timestamp() - make_interval(secs => :kept)
       OR NOT EXISTS (SELECT 1 FROM sessions s WHERE s.id = n.session_id AND s.deleted_at IS NULL AND s.archived_at IS NULL)
""")


async def take(db: Database, blobs: BlobStore, sandbox: Sandbox) -> None:
    """Store what the sandbox holds now and make it the session's snapshot. Repeating replaces it.

    Raises: SandboxError, BlobTooLarge, OSError.
    """
    begun = time.monotonic()
    # Closed here: where the store takes no more of it, the connection to the sandbox is not to be left to the garbage collector.
    async with aclosing(sandbox.snapshot()) as content:
        blob = await blobs.put(content, limits.SNAPSHOT_BYTES_MAX)
    faults.reach(STORED)
    values = {"sandbox_id": sandbox.id, "sha256": blob.sha256, "size": blob.size}
    async with db.transaction() as tx:
        await tx.execute(_RECORD, {**values, "age": time.monotonic() - begun})


async def latest(tx: Tx, session_id: str) -> Snapshot | None:
    """The session's snapshot, unless its state is too old to be used."""
    row = (await tx.execute(_LATEST, {"session_id": session_id, "kept": limits.SANDBOX_STATE_SECONDS})).one_or_none()
    return None if row is None else Snapshot(BlobRef(row.sha256, row.size_bytes), row.generation, row.taken_at)


async def drop(tx: Tx, session_id: str, blob: BlobRef) -> None:
    """Forget a snapshot that cannot be restored, so that nobody tries again."""
    await tx.execute(_DROP, {"session_id": session_id, "sha256": blob.sha256})


async def expire(tx: Tx) -> None:
    """Forget what is too old, and what belongs to no session that can go on."""
    await tx.execute(_EXPIRE, {"kept": limits.SANDBOX_STATE_SECONDS})


def referenced(digests: Sequence[str]) -> Select[str]:
    """Select which of `digests` are snapshots, for the blob collector."""
    return select(SandboxSnapshotRow.sha256).where(SandboxSnapshotRow.sha256.in_(digests)).distinct()
