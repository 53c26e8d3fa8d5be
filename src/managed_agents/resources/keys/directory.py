"""Whose a secret is, for every request: a bounded cache before the table.

Invariant: a right that was taken away counts at once in every process that hears the ring, and within `CACHE_SECONDS` in one
that does not. Race: a row read before the change must not be cached after the ring; `_changes` tells.
"""

import hashlib
import hmac
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from time import monotonic
from typing import Any

import anyio
from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import InstrumentedAttribute, aliased

from managed_agents.core import clock as wall
from managed_agents.core.ids import ApiKeyId, EnvironmentId, OrganizationId, WorkspaceId
from managed_agents.db.engine import Database
from managed_agents.resources.keys.tables import ApiKeyRow
from managed_agents.resources.organizations.tables import WorkspaceRow
from managed_agents.resources.rate_limits.tables import WorkspaceRateLimitRow
from managed_agents.web.actor import Actor, RateKind, Scope

log = logging.getLogger(__name__)

CACHE_SECONDS = 5.0
CACHE_KEYS_MAX = 10_000
LAST_USED_EVERY = timedelta(minutes=1)
LOOK_AGAIN_SECONDS = 30.0
EXPIRY_SECONDS_MIN = 0.5  # between two looks at a key that ends about now: the database's clock decides, and may be behind ours

CacheKey = bytes | tuple[str, str]  # a secret's digest; a key and the other workspace it acts in, "" for its own


def digest_of(secret: str, hmac_key: bytes) -> bytes:
    """Return what is stored in place of `secret`."""
    return hmac.digest(hmac_key, secret.encode("utf-8", "surrogatepass"), hashlib.sha256)


class Cache:
    """Actors for `CACHE_SECONDS`, or less where a key ends sooner; unknown secrets are never cached."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._actors: OrderedDict[CacheKey, tuple[Actor, float]] = OrderedDict()
        self._changes = 0

    @property
    def state(self) -> int:
        """What `put` compares: an actor read before a change is not kept."""
        return self._changes

    def get(self, key: CacheKey) -> Actor | None:
        """Return a cached actor."""
        cached = self._actors.get(key)
        if cached is not None and cached[1] > self._clock():
            return cached[0]
        self._actors.pop(key, None)
        return None

    def put(self, key: CacheKey, actor: Actor, state: int, seconds: float) -> None:
        """Keep an actor that was read in `state`."""
        if state != self._changes:
            return
        self._actors[key] = (actor, self._clock() + min(seconds, CACHE_SECONDS))
        if len(self._actors) > CACHE_KEYS_MAX:
            self._actors.popitem(last=False)

    def forget(self, ids: Iterable[str] | None) -> None:
        """Drop what belongs to these keys and workspaces, or everything."""
        self._changes += 1
        if ids is None:
            self._actors.clear()
            return
        changed = frozenset(ids)
        for key, (actor, _) in list(self._actors.items()):
            if actor.key_id in changed or actor.workspace_id in changed:
                del self._actors[key]


_CREATES = aliased(WorkspaceRateLimitRow)
_READS = aliased(WorkspaceRateLimitRow)
_WORKSPACE = (
    select(
        WorkspaceRow.id,
        WorkspaceRow.organization_id,
        WorkspaceRow.is_default,
        _CREATES.requests_per_minute,
        _READS.requests_per_minute,
    )
    .outerjoin(_CREATES, and_(_CREATES.workspace_id == WorkspaceRow.id, _CREATES.kind == RateKind.CREATE.value))
    .outerjoin(_READS, and_(_READS.workspace_id == WorkspaceRow.id, _READS.kind == RateKind.READ.value))
    .where(WorkspaceRow.archived_at.is_(None))
)
_UNUSED_LATELY = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < func.now() - LAST_USED_EVERY)
_KEY = (
    _WORKSPACE.join(ApiKeyRow, ApiKeyRow.workspace_id == WorkspaceRow.id)
    .add_columns(
        ApiKeyRow.id,
        ApiKeyRow.scope,
        ApiKeyRow.environment_id,
        ApiKeyRow.expires_at,
        func.extract("epoch", ApiKeyRow.expires_at - func.now()),
        _UNUSED_LATELY,
    )
    .where(
        ApiKeyRow.revoked_at.is_(None),
        ~ApiKeyRow.inactive,
        or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > func.now()),
    )
)


async def find(db: Database, which: ColumnElement[bool]) -> tuple[Actor, float] | None:
    """Look a live key up and note the use, at most once a minute. Returns the actor and for how long it is certain."""
    async with db.autocommit() as tx:
        row = (await tx.execute(_KEY.where(which))).one_or_none()
        if row is None:
            return None
        workspace_id, organization_id, is_default, creates, reads, key_id, scope, environment_id, expires_at, lasts, stale = row
        if stale:
            # Never waits for another process that notes the same.
            free = select(ApiKeyRow.id).where(ApiKeyRow.id == key_id, _UNUSED_LATELY).with_for_update(skip_locked=True)
            await tx.execute(update(ApiKeyRow).where(ApiKeyRow.id.in_(free)).values(last_used_at=func.now()))
    actor = Actor(
        OrganizationId(organization_id),
        WorkspaceId(workspace_id),
        ApiKeyId(key_id),
        Scope.named(scope),
        environment_id=None if environment_id is None else EnvironmentId(environment_id),
        of_default_workspace=is_default,
        creates_per_minute=creates,
        reads_per_minute=reads,
        key_expires_at=expires_at,
    )
    return actor, CACHE_SECONDS if lasts is None else float(lasts)


async def find_elsewhere(db: Database, actor: Actor, workspace_id: str) -> Actor | None:
    """Return `actor` in another live workspace of its organisation."""
    statement = _WORKSPACE.where(WorkspaceRow.id == workspace_id, WorkspaceRow.organization_id == actor.organization_id)
    async with db.autocommit() as tx:
        row = (await tx.execute(statement)).one_or_none()
    if row is None:
        return None
    _, _, _, creates, reads = row
    return replace(actor, workspace_id=WorkspaceId(workspace_id), creates_per_minute=creates, reads_per_minute=reads)


class KeyDirectory:
    """Finds actors by secret."""

    def __init__(self, db: Database, hmac_key: bytes, *, clock: Callable[[], float] = monotonic) -> None:
        self._db = db
        self.hmac_key = hmac_key
        self._cache = Cache(clock)
        self._changed = anyio.Event()

    async def lookup(self, secret: str) -> Actor | None:
        """Return the actor of a live key, None for anything else."""
        digest = digest_of(secret, self.hmac_key)
        return await self._cached(digest, ApiKeyRow.secret_hmac, digest)

    async def in_workspace(self, actor: Actor, workspace_id: str) -> Actor | None:
        """Return an organisation administrator acting in another live workspace, None when there is no such workspace."""
        key = (actor.key_id, workspace_id)
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        state = self._cache.state
        found = await find_elsewhere(self._db, actor, workspace_id)
        if found is not None:
            self._cache.put(key, found, state, CACHE_SECONDS)
        return found

    async def lost(self, actor: Actor) -> None:
        """Return when `actor` may not go on; for streams, which outlive many lookups.

        Looks whenever rights changed, when the key ends by itself, and now and then. What many streams ask is asked once.
        """
        while True:
            changed = self._changed  # of before the look, so that no change falls between
            try:
                if not await self._is_live(actor):
                    return
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                log.warning("cannot tell whether a stream's key is live", extra={"cause": repr(error)})
            with anyio.move_on_after(_seconds_to_next_look(actor)):
                await changed.wait()

    def forget(self, ids: Iterable[str] | None = None) -> None:
        """Drop what is cached of these keys and workspaces, or everything: the listener of the keys' doorbell."""
        self._cache.forget(ids)
        self._changed.set()
        self._changed = anyio.Event()

    async def _is_live(self, actor: Actor) -> bool:
        found = await self._cached((actor.key_id, ""), ApiKeyRow.id, actor.key_id)
        if found is None or found.workspace_id == actor.workspace_id:
            return found is not None
        return await self.in_workspace(found, actor.workspace_id) is not None

    async def _cached(self, key: CacheKey, column: InstrumentedAttribute[Any], value: str | bytes) -> Actor | None:
        """The actor of the key whose `column` has `value`. The condition is only built where there is something to ask."""
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        state = self._cache.state
        found = await find(self._db, column == value)
        if found is None:
            return None
        self._cache.put(key, found[0], state, found[1])
        return found[0]


def _seconds_to_next_look(actor: Actor) -> float:
    if actor.key_expires_at is None:
        return LOOK_AGAIN_SECONDS
    left = (actor.key_expires_at - wall.now()).total_seconds()
    return min(LOOK_AGAIN_SECONDS, max(EXPIRY_SECONDS_MIN, left))
