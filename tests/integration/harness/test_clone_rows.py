"""Rows of cached clones: whose they are, how many there may be, when they go."""

from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from sqlalchemy import text

from managed_agents.blobstore.local import LocalBlobStore
from managed_agents.blobstore.store import BlobRef
from managed_agents.core import limits
from managed_agents.db.engine import Database
from managed_agents.harness.clone_cache import CloneCache
from managed_agents.resources.sessions import bindings, clones
from managed_agents.resources.sessions.clones import CachedClone, CloneKey
from managed_agents.resources.sessions.repositories import Repository
from tests.support import sessions

pytestmark = pytest.mark.anyio

BLOB = BlobRef("a" * 64, 40)
OTHER = BlobRef("b" * 64, 50)
_AGE = text(
    "UPDATE repository_clones SET used_at = used_at - make_interval(secs => :secs), "
    "created_at = created_at - make_interval(secs => :secs) WHERE url = :url"
)


@pytest.mark.requirement("SES-100")
async def test_a_clone_is_found_by_its_very_key_and_goes_when_unused_or_crowded_out(db: Database) -> None:
    mine, theirs = await sessions.workspace(db), await sessions.workspace(db)
    keys = [CloneKey(mine, f"https://github.com/acme/{name}", "x") for name in ("one", "two", "three")]
    first, second, third = keys
    async with db.transaction() as tx:
        for key in (first, second):
            await clones.record(tx, key, BLOB, bytes_max=100)
    async with db.autocommit() as tx:
        assert await clones.use(tx, second) == CachedClone(BLOB, fresh=True)
        assert await clones.use(tx, first) == CachedClone(BLOB, fresh=True)
        for key in (CloneKey(theirs, first.url, "x"), CloneKey(mine, first.url, ""), CloneKey(mine, third.url, "x")):
            assert await clones.use(tx, key) is None
        # Old ones are used once more, and replaced.
        await tx.execute(_AGE, {"secs": limits.CLONE_FRESH_SECONDS, "url": first.url})
        assert await clones.use(tx, first) == CachedClone(BLOB, fresh=False)
        await clones.record(tx, first, OTHER, bytes_max=100)
        assert await clones.use(tx, first) == CachedClone(OTHER, fresh=True)
        # The longest unused makes room; another workspace's are another matter.
        await clones.record(tx, CloneKey(theirs, first.url, "x"), OTHER, bytes_max=100)
        await clones.record(tx, third, BLOB, bytes_max=100)
        assert [(await clones.use(tx, key)) is not None for key in keys] == [True, False, True]
        # One that was replaced meanwhile is not dropped.
        await clones.drop(tx, first, BLOB)
        assert await clones.use(tx, first) is not None
        await clones.drop(tx, first, OTHER)
        assert await clones.use(tx, first) is None
        referenced = (await tx.execute(clones.referenced([BLOB.sha256, OTHER.sha256, "c" * 64]))).scalars()
        assert set(referenced) == {BLOB.sha256, OTHER.sha256}
        await tx.execute(_AGE, {"secs": limits.CLONE_UNUSED_SECONDS, "url": third.url})
        await clones.expire(tx)
        assert await clones.use(tx, third) is None
        assert await clones.use(tx, CloneKey(theirs, first.url, "x")) is not None
        await tx.execute(text("UPDATE workspaces SET archived_at = now() WHERE id = :id"), {"id": theirs})
        await clones.expire(tx)
        await clones.record(tx, CloneKey(theirs, first.url, "x"), OTHER, bytes_max=100)
        assert await clones.use(tx, CloneKey(theirs, first.url, "x")) is None


@pytest.mark.requirement("SES-100")
async def test_no_sandbox_is_trusted_once_a_call_was_sent_to_any_of_the_session(db: Database) -> None:
    session_id, _ = await sessions.session(db, await sessions.workspace(db))
    bind = text("INSERT INTO sandboxes (id, session_id, generation, host, state) VALUES (:id, :session_id, :nth, 'here', 'live')")
    async with db.transaction() as tx:
        await tx.execute(bind, {"id": "sbx_1", "session_id": session_id, "nth": 1})
        assert await clones.pristine(tx, session_id)
        await bindings.touch(tx, "sbx_1")
        assert not await clones.pristine(tx, session_id)
        # What was restored into the next one may be the first one's.
        await bindings.set_destroyed(tx, "sbx_1")
        await tx.execute(bind, {"id": "sbx_2", "session_id": session_id, "nth": 2})
        assert not await clones.pristine(tx, session_id)


async def test_a_server_may_keep_none(db: Database, tmp_path: Path) -> None:
    workspace_id = await sessions.workspace(db)
    session_id, _ = await sessions.session(db, workspace_id)
    wanted = Repository("sesrsc_1", "https://github.com/acme/one", "/workspace/one")
    keys: list[CloneKey | None] = []
    for bytes_max in (0, 100):
        cache = CloneCache(db, LocalBlobStore(tmp_path), bytes_max, anyio.CapacityLimiter(1))
        keys.append(await cache.key(session_id, workspace_id, wanted))
    assert keys == [None, CloneKey(workspace_id, wanted.url, "")]
    # A token that was stored before there were fingerprints.
    assert clones.key_of(workspace_id, replace(wanted, has_token=True)) is None
