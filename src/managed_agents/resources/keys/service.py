"""API keys: make, list, revoke, and tell whose a secret is.

Invariant: a secret is shown once and never stored. What is stored is its HMAC under a key of the
installation: secrets are random, so a fast digest is enough, and a stolen table is useless without the
master key. A revoked key may live on in other processes' caches for `CACHE_SECONDS`.
"""

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic

from pydantic import SecretStr
from sqlalchemy import func, insert, literal, or_, select, text, update

from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.core.ids import API_KEY, ApiKeyId, OrganizationId, WorkspaceId, new_id
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.keys.tables import ApiKeyRow
from managed_agents.resources.organizations.service import (
    Workspace,
    ensure_default_workspace,
    retrieve_workspace,
)
from managed_agents.resources.organizations.tables import WorkspaceRow
from managed_agents.web.actor import Actor, Scope

SECRET_PREFIX = "sk-ma-"
HINT_CHARS = 4
NAME_CHARS_MAX = 256
SECRET_CHARS_MIN = 16
CACHE_SECONDS = 5.0
CACHE_KEYS_MAX = 10_000
LAST_USED_EVERY = timedelta(minutes=1)
BOOTSTRAP_LOCK = 0x6D61_626F_6F74  # "maboot"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as shown to operators; the secret is not part of it."""

    id: ApiKeyId
    workspace_id: WorkspaceId
    name: str
    scope: Scope
    hint: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key just made, with the only copy of its secret."""

    key: ApiKey
    secret: SecretStr


class KeyDirectory:
    """Finds actors by secret, with a bounded cache of `CACHE_SECONDS`; unknown secrets are never cached."""

    def __init__(self, db: Database, hmac_key: bytes, *, clock: Callable[[], float] = monotonic) -> None:
        self._db = db
        self._hmac_key = hmac_key
        self._clock = clock
        self._cache: OrderedDict[bytes, tuple[Actor, float]] = OrderedDict()

    async def lookup(self, secret: str) -> Actor | None:
        """Return the actor of a live key, None for anything else."""
        digest = digest_of(secret, self._hmac_key)
        cached = self._cache.get(digest)
        if cached is not None and cached[1] > self._clock():
            return cached[0]
        self._cache.pop(digest, None)
        actor = await _find(self._db, digest)
        if actor is not None:
            self._cache[digest] = (actor, self._clock() + CACHE_SECONDS)
            if len(self._cache) > CACHE_KEYS_MAX:
                self._cache.popitem(last=False)
        return actor

    def forget(self) -> None:
        """Drop everything cached, so that a revocation counts at once in this process."""
        self._cache.clear()


def digest_of(secret: str, hmac_key: bytes) -> bytes:
    """Return what is stored in place of `secret`."""
    return hmac.digest(hmac_key, secret.encode("utf-8", "surrogatepass"), hashlib.sha256)


async def create(db: Database, hmac_key: bytes, *, workspace_id: str, name: str, scope: Scope = Scope.DEVELOPER) -> NewApiKey:
    """Make a key. The secret is in the answer and nowhere else. Raises `NotFound` for an unknown
    workspace.
    """
    if not 1 <= len(name) <= NAME_CHARS_MAX:
        raise InvalidRequest(f"name: must have 1 to {NAME_CHARS_MAX} characters")
    secret = SecretStr(SECRET_PREFIX + secrets.token_urlsafe(32))
    async with db.transaction() as tx:
        await retrieve_workspace(tx, workspace_id)
        key = await _insert(tx, workspace_id, name, scope, secret, hmac_key)
    return NewApiKey(key, secret)


async def list_keys(db: Database, *, workspace_id: str | None = None) -> list[ApiKey]:
    """Return keys, oldest first; revoked ones too."""
    statement = _SELECT.order_by(ApiKeyRow.created_at, ApiKeyRow.id)
    if workspace_id is not None:
        statement = statement.where(ApiKeyRow.workspace_id == workspace_id)
    async with db.transaction() as tx:
        return [_key(*row) for row in (await tx.execute(statement))]


async def revoke(db: Database, key_id: str) -> ApiKey:
    """Make a key useless. Repeating keeps the first instant. Raises `NotFound`."""
    async with db.transaction() as tx:
        await tx.execute(
            update(ApiKeyRow).where(ApiKeyRow.id == key_id, ApiKeyRow.revoked_at.is_(None)).values(revoked_at=func.now())
        )
        row = (await tx.execute(_SELECT.where(ApiKeyRow.id == key_id))).one_or_none()
    if row is None:
        raise NotFound("API key not found.")
    return _key(*row)


async def bootstrap(db: Database, hmac_key: bytes, first_key: SecretStr) -> Workspace:
    """Make sure that organisation, workspace and a live admin key with this secret exist.

    Repeating is safe, also from several processes at once: an advisory lock lets them pass one by one. A
    key that was revoked stays revoked.
    """
    secret = first_key.get_secret_value()
    if len(secret) < SECRET_CHARS_MIN or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise InvalidRequest(f"api_key: must be printable ASCII of at least {SECRET_CHARS_MIN} characters")
    async with db.transaction() as tx:
        await tx.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": BOOTSTRAP_LOCK})
        workspace = await ensure_default_workspace(tx)
        digest = digest_of(secret, hmac_key)
        known = await tx.scalar(select(literal(1)).where(ApiKeyRow.secret_hmac == digest))
        if known is None:
            await _insert(tx, workspace.id, "first key", Scope.ADMIN, first_key, hmac_key)
    return workspace


_SELECT = select(
    ApiKeyRow.id,
    ApiKeyRow.workspace_id,
    ApiKeyRow.name,
    ApiKeyRow.scope,
    ApiKeyRow.hint,
    ApiKeyRow.created_at,
    ApiKeyRow.last_used_at,
    ApiKeyRow.revoked_at,
)


def _key(
    id_: str,
    workspace_id: str,
    name: str,
    scope: str,
    hint: str,
    created_at: datetime,
    last_used_at: datetime | None,
    revoked_at: datetime | None,
) -> ApiKey:
    return ApiKey(
        ApiKeyId(id_),
        WorkspaceId(workspace_id),
        name,
        Scope.named(scope),
        hint,
        created_at,
        last_used_at,
        revoked_at,
    )


async def _insert(tx: Tx, workspace_id: str, name: str, scope: Scope, secret: SecretStr, hmac_key: bytes) -> ApiKey:
    key_id = new_id(API_KEY)
    await tx.execute(
        insert(ApiKeyRow).values(
            id=key_id,
            workspace_id=workspace_id,
            name=name,
            scope=scope.name.lower(),
            secret_hmac=digest_of(secret.get_secret_value(), hmac_key),
            hint=secret.get_secret_value()[-HINT_CHARS:],
        )
    )
    row = (await tx.execute(_SELECT.where(ApiKeyRow.id == key_id))).one()
    return _key(*row)


async def _find(db: Database, digest: bytes) -> Actor | None:
    """Look a digest up and note the use, at most once a minute and never waiting for another process
    doing so.
    """
    async with db.transaction() as tx:
        statement = (
            select(ApiKeyRow.id, ApiKeyRow.workspace_id, ApiKeyRow.scope, WorkspaceRow.organization_id)
            .join(WorkspaceRow, WorkspaceRow.id == ApiKeyRow.workspace_id)
            .where(ApiKeyRow.secret_hmac == digest, ApiKeyRow.revoked_at.is_(None))
        )
        row = (await tx.execute(statement)).one_or_none()
        if row is None:
            return None
        key_id, workspace_id, scope, organization_id = row
        stale = (
            select(ApiKeyRow.id)
            .where(
                ApiKeyRow.id == key_id,
                or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < func.now() - LAST_USED_EVERY),
            )
            .with_for_update(skip_locked=True)
        )
        await tx.execute(update(ApiKeyRow).where(ApiKeyRow.id.in_(stale.scalar_subquery())).values(last_used_at=func.now()))
    return Actor(OrganizationId(organization_id), WorkspaceId(workspace_id), ApiKeyId(key_id), Scope.named(scope))
