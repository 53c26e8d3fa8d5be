"""Cached clones of repositories: one row for each workspace, URL and token, its bytes in the blob store.

What a session is given from here was sent by the repository's host to a session of the same workspace that had the same token,
and is only ever used beside the host's own word on who may read it and where its branches are: see `harness/clone_cache.py`. A
bundle is stored before its row is written; the blob collector spares it meanwhile. Race: two sessions keep the same repository
at once. The later row wins, and the other's bytes are collected because no row names them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Select, select, text

from managed_agents.blobstore.store import BlobRef
from managed_agents.core import limits
from managed_agents.db.engine import Tx
from managed_agents.resources.sessions.repositories import Repository
from managed_agents.resources.sessions.tables import RepositoryCloneRow

WITHOUT_TOKEN = ""


@dataclass(frozen=True, slots=True)
class CloneKey:
    """Whose cached clone: nobody gets what another workspace or another token fetched."""

    workspace_id: str
    url: str
    token_fingerprint: str


@dataclass(frozen=True, slots=True)
class CachedClone:
    """A clone that may be used; one that is not `fresh` is replaced after that."""

    blob: BlobRef
    fresh: bool


_KEY = "workspace_id = :workspace_id AND url = :url AND token_fingerprint = :token_fingerprint"
_USE = text(f"""
    UPDATE repository_clones SET used_at = clock_timestamp() WHERE {_KEY}
    RETURNING sha256, size_bytes, created_at > clock_timestamp() - make_interval(secs => :fresh) AS fresh
""")
_RECORD = text("""
    INSERT INTO repository_clones (workspace_id, url, token_fingerprint, sha256, size_bytes)
    SELECT id, :url, :token_fingerprint, :sha256, :size FROM workspaces WHERE id = :workspace_id AND archived_at IS NULL
    ON CONFLICT (workspace_id, url, token_fingerprint) DO UPDATE SET sha256 = excluded.sha256, size_bytes = excluded.size_bytes,
        created_at = clock_timestamp(), used_at = clock_timestamp()
""")
# The longest unused go first.
_MAKE_ROOM = text("""
    DELETE FROM repository_clones c USING (
        SELECT url, token_fingerprint, sum(size_bytes) OVER (ORDER BY used_at DESC, url, token_fingerprint) AS together
        FROM repository_clones WHERE workspace_id = :workspace_id
    ) o
    WHERE c.workspace_id = :workspace_id AND c.url = o.url AND c.token_fingerprint = o.token_fingerprint
      AND o.together > :bytes_max
""")
_DROP = text(f"DELETE FROM repository_clones WHERE {_KEY} AND sha256 = :sha256")
_EXPIRE = text("""
    DELETE FROM repository_clones c WHERE used_at <= clock_timestamp() - make_interval(secs => :kept)
       OR NOT EXISTS (SELECT 1 FROM workspaces w WHERE w.id = c.workspace_id AND w.archived_at IS NULL)
""")
_PRISTINE = text("SELECT NOT EXISTS (SELECT 1 FROM sandboxes WHERE session_id = :session_id AND used_at IS NOT NULL)")


def key_of(workspace_id: str, repository: Repository) -> CloneKey | None:
    """Where a repository's clone is kept; None for a token that was stored before there were fingerprints."""
    if not repository.has_token:
        return CloneKey(workspace_id, repository.url, WITHOUT_TOKEN)
    if repository.token_fingerprint is None:
        return None
    return CloneKey(workspace_id, repository.url, repository.token_fingerprint)


async def pristine(tx: Tx, session_id: str) -> bool:
    """Whether nothing that the model wrote can have touched any sandbox of the session: no call was ever sent to one."""
    return bool((await tx.execute(_PRISTINE, {"session_id": session_id})).scalar_one())


async def use(tx: Tx, key: CloneKey) -> CachedClone | None:
    """The cached clone, recorded as used now."""
    row = (await tx.execute(_USE, {**_values(key), "fresh": limits.CLONE_FRESH_SECONDS})).one_or_none()
    return None if row is None else CachedClone(BlobRef(row.sha256, row.size_bytes), row.fresh)


async def record(tx: Tx, key: CloneKey, blob: BlobRef, *, bytes_max: int) -> None:
    """Make a stored bundle the cached clone; of the workspace's others go as many as are beyond `bytes_max`."""
    await tx.execute(_RECORD, {**_values(key), "sha256": blob.sha256, "size": blob.size})
    await tx.execute(_MAKE_ROOM, {"workspace_id": key.workspace_id, "bytes_max": bytes_max})


async def drop(tx: Tx, key: CloneKey, blob: BlobRef) -> None:
    """Forget a clone that cannot be used, so that nobody tries again."""
    await tx.execute(_DROP, {**_values(key), "sha256": blob.sha256})


async def expire(tx: Tx) -> None:
    """Forget what nobody used for long, and what belongs to a workspace that was archived."""
    await tx.execute(_EXPIRE, {"kept": limits.CLONE_UNUSED_SECONDS})


def referenced(digests: Sequence[str]) -> Select[str]:
    """Select which of `digests` are cached clones, for the blob collector."""
    return select(RepositoryCloneRow.sha256).where(RepositoryCloneRow.sha256.in_(digests)).distinct()


def _values(key: CloneKey) -> dict[str, str]:
    return {"workspace_id": key.workspace_id, "url": key.url, "token_fingerprint": key.token_fingerprint}
