"""API keys and environment keys: make, list, change, revoke.

Invariant: a secret is shown once and never stored. What is stored is its HMAC under a key of the installation: secrets are
random, so a fast digest is enough, and a stolen table is useless without the master key.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Select, and_, case, false, func, insert, literal, select, text, update

from managed_agents.core import clock, ids, limits
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.core.ids import API_KEY, ENVIRONMENT_KEY, new_id
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.environments.tables import EnvironmentRow
from managed_agents.resources.keys.directory import CACHE_SECONDS, KeyDirectory, digest_of
from managed_agents.resources.keys.rights import ring
from managed_agents.resources.keys.schemas import NAME_CHARS_MAX, ListKeysQuery, UpdateKey
from managed_agents.resources.keys.tables import ApiKeyRow
from managed_agents.resources.organizations.service import (
    Workspace,
    default_workspace,
    ensure_default_workspace,
    retrieve_within,
)
from managed_agents.resources.organizations.tables import WorkspaceRow
from managed_agents.web.actor import Reach, Scope
from managed_agents.web.object_pages import ObjectPageQuery, object_page

__all__ = ["CACHE_SECONDS", "KeyDirectory", "digest_of"]  # of `directory`, for those who make keys and look them up

SECRET_PREFIX = "sk-ma-"
ENVIRONMENT_SECRET_PREFIX = "sk-ma-env-"
HINT_CHARS = 4
SECRET_CHARS_MIN = 16
BOOTSTRAP_LOCK = 0x6D61_626F_6F74  # "maboot"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as shown to operators; the secret is not part of it."""

    id: str
    workspace_id: str
    environment_id: str | None
    name: str
    scope: Scope
    hint: str
    status: str  # active, inactive, expired or archived
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None

    def body(self) -> dict[str, Any]:
        """Return the object as shown to clients (spec: APIKey; `access_scope` and `last_used_at` are ours)."""
        shown: dict[str, Any] = {
            "id": self.id,
            "type": "api_key",
            "name": self.name,
            "status": self.status,
            "partial_key_hint": f"...{self.hint}",
            "scope": {"type": "workspace", "workspace_id": self.workspace_id},
            "access_scope": self.scope.name.lower(),
            "principal": None,
            "created_by": None,
            "created_at": clock.millis(self.created_at),
            "expires_at": _millis(self.expires_at),
            "last_used_at": _millis(self.last_used_at),
        }
        if self.environment_id is not None:
            for name in ("scope", "access_scope", "principal", "created_by"):
                del shown[name]
            shown |= {"type": "environment_key", "environment_id": self.environment_id}
        return shown


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key just made, with the only copy of its secret."""

    key: ApiKey
    secret: SecretStr

    def body(self) -> dict[str, Any]:
        """Return the object as shown to clients, this once with its secret."""
        return self.key.body() | {"secret": self.secret.get_secret_value()}


async def create(
    db: Database,
    hmac_key: bytes,
    *,
    workspace_id: str,
    name: str,
    scope: Scope = Scope.DEVELOPER,
    expires_at: datetime | None = None,
    reach: Reach | None = None,
) -> NewApiKey:
    """Make a key; without `reach` for an operator, who may do so anywhere. The secret is in the answer and nowhere else.

    Raises `NotFound` for an unknown workspace.
    """
    if not 1 <= len(name) <= NAME_CHARS_MAX:
        raise InvalidRequest(f"name: must have 1 to {NAME_CHARS_MAX} characters")
    secret = SecretStr(SECRET_PREFIX + secrets.token_urlsafe(32))
    within = reach or Reach((await default_workspace(db)).organization_id, None)
    async with db.transaction() as tx:
        await _live_workspace(tx, within, workspace_id)
        values = {"workspace_id": workspace_id, "name": name, "expires_at": await _future(tx, expires_at)}
        return NewApiKey(await _insert(tx, new_id(API_KEY), scope, secret, hmac_key, values), secret)


async def list_keys(db: Database, *, workspace_id: str | None = None, environment_id: str | None = None) -> list[ApiKey]:
    """Return API keys, or an environment's keys, oldest first and revoked ones too; for operators."""
    statement = _SELECT.where(ApiKeyRow.environment_id.is_not_distinct_from(environment_id))
    statement = statement.order_by(ApiKeyRow.created_at, ApiKeyRow.id)
    if workspace_id is not None:
        statement = statement.where(ApiKeyRow.workspace_id == workspace_id)
    async with db.autocommit() as tx:
        return [_key(row) for row in await tx.execute(statement)]


async def page(db: Database, reach: Reach, query: ListKeysQuery) -> dict[str, Any]:
    """Return a page of API keys, newest first."""
    visible = _within(reach)
    statement = visible
    if query.status is not None:
        statement = statement.where(_STATUS.in_([query.status]))
    if query.workspace_id is not None:
        statement = statement.where(ApiKeyRow.workspace_id == query.workspace_id)
    if query.created_by_user_id is not None:
        statement = statement.where(false())  # there are no users: nobody is recorded as the creator
    return await _page(db, statement, visible, query)


async def retrieve(db: Database, reach: Reach, key_id: str) -> ApiKey:
    """Return an API key. Raises `NotFound`."""
    async with db.autocommit() as tx:
        return await _retrieve(tx, _within(reach), key_id)


async def update_key(db: Database, reach: Reach, key_id: str, command: UpdateKey) -> ApiKey:
    """Rename a key, switch it off or on, or revoke it for ever. Raises `NotFound`."""
    async with db.transaction() as tx:
        stored = await _retrieve(tx, _within(reach).with_for_update(of=ApiKeyRow), key_id)
        if stored.revoked_at is not None:
            if command.name in (None, stored.name) and command.status in (None, "archived"):
                return stored
            raise InvalidRequest("Cannot modify archived API key")
        values: dict[str, Any] = {"name": command.name or stored.name}
        if command.status == "archived":
            values["revoked_at"] = func.now()
        elif command.status is not None:
            values["inactive"] = command.status == "inactive"
            if stored.status == "inactive" and command.status == "active":
                await _live_workspace(tx, reach, stored.workspace_id)
        await tx.execute(update(ApiKeyRow).where(ApiKeyRow.id == key_id).values(values))
        await ring(tx, key_id)
        return await _retrieve(tx, _SELECT, key_id)


async def revoke(db: Database, key_id: str) -> ApiKey:
    """Make a key of either kind useless, everywhere at once. Repeating keeps the first instant. Raises `NotFound`."""
    async with db.transaction() as tx:
        return await _revoke(tx, _SELECT, key_id)


async def create_for_environment(
    db: Database, hmac_key: bytes, workspace_id: str, environment_id: str, *, name: str, expires_at: datetime | None = None
) -> NewApiKey:
    """Make an environment key. Raises `NotFound` for an unknown environment."""
    secret = SecretStr(ENVIRONMENT_SECRET_PREFIX + secrets.token_urlsafe(32))
    async with db.transaction() as tx:
        await _check_environment(tx, workspace_id, environment_id, live=True)
        await _count_below_limit(tx, workspace_id)
        values = {
            "workspace_id": workspace_id,
            "environment_id": environment_id,
            "name": name,
            "expires_at": await _future(tx, expires_at),
        }
        return NewApiKey(await _insert(tx, new_id(ENVIRONMENT_KEY), Scope.DEVELOPER, secret, hmac_key, values), secret)


async def page_of_environment(db: Database, workspace_id: str, environment_id: str, query: ObjectPageQuery) -> dict[str, Any]:
    """Return a page of an environment's keys, newest first. Raises `NotFound` for an unknown environment."""
    async with db.autocommit() as tx:
        await _check_environment(tx, workspace_id, environment_id, live=False)
    visible = _of_environment(workspace_id, environment_id)
    return await _page(db, visible, visible, query)


async def revoke_of_environment(db: Database, workspace_id: str, environment_id: str, key_id: str) -> ApiKey:
    """Make an environment key useless, everywhere at once. Repeating is safe. Raises `NotFound`."""
    async with db.transaction() as tx:
        await _check_environment(tx, workspace_id, environment_id, live=False)
        return await _revoke(tx, _of_environment(workspace_id, environment_id), key_id)


async def workspace_of_environment(db: Database, environment_id: str) -> str:
    """Return whose an environment is; for operators. Raises `NotFound`."""
    async with db.autocommit() as tx:
        found = await tx.scalar(select(EnvironmentRow.workspace_id).where(EnvironmentRow.id == environment_id))
    if found is None:
        raise _no_environment()
    return found


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
        known = await tx.scalar(select(literal(1)).where(ApiKeyRow.secret_hmac == digest_of(secret, hmac_key)))
        if known is None:
            values = {"workspace_id": workspace.id, "name": "first key"}
            await _insert(tx, new_id(API_KEY), Scope.ADMIN, first_key, hmac_key, values)
    return workspace


_STATUS = case(
    (ApiKeyRow.revoked_at.is_not(None), "archived"),
    (and_(ApiKeyRow.expires_at.is_not(None), ApiKeyRow.expires_at <= func.now()), "expired"),
    (ApiKeyRow.inactive, "inactive"),
    else_="active",
)
_SELECT = select(
    ApiKeyRow.id,
    ApiKeyRow.workspace_id,
    ApiKeyRow.environment_id,
    ApiKeyRow.name,
    ApiKeyRow.scope,
    ApiKeyRow.hint,
    _STATUS,
    ApiKeyRow.created_at,
    ApiKeyRow.last_used_at,
    ApiKeyRow.expires_at,
    ApiKeyRow.revoked_at,
)


def _key(row: Sequence[Any]) -> ApiKey:
    key_id, workspace_id, environment_id, name, scope, *rest = row
    return ApiKey(key_id, workspace_id, environment_id, name, Scope.named(scope), *rest)


def _millis(instant: datetime | None) -> str | None:
    return None if instant is None else clock.millis(instant)


def _within(reach: Reach) -> Select[*tuple[Any, ...]]:
    """Select the API keys that an administrator may see."""
    statement = _SELECT.join(WorkspaceRow, WorkspaceRow.id == ApiKeyRow.workspace_id).where(
        WorkspaceRow.organization_id == reach.organization_id, ApiKeyRow.environment_id.is_(None)
    )
    return statement if reach.workspace_id is None else statement.where(ApiKeyRow.workspace_id == reach.workspace_id)


def _of_environment(workspace_id: str, environment_id: str) -> Select[*tuple[Any, ...]]:
    return _SELECT.where(ApiKeyRow.workspace_id == workspace_id, ApiKeyRow.environment_id == environment_id)


async def _page(
    db: Database, statement: Select[*tuple[Any, ...]], visible: Select[*tuple[Any, ...]], query: ObjectPageQuery
) -> dict[str, Any]:
    async with db.autocommit() as tx:
        return await object_page(
            tx,
            statement,
            visible,
            query,
            created_at=ApiKeyRow.created_at.expression,
            id_=ApiKeyRow.id.expression,
            shown=lambda row: _key(row).body(),
        )


async def _retrieve(tx: Tx, visible: Select[*tuple[Any, ...]], key_id: str) -> ApiKey:
    row = None
    if ids.has_prefix(key_id, ids.API_KEY) or ids.has_prefix(key_id, ids.ENVIRONMENT_KEY):
        row = (await tx.execute(visible.where(ApiKeyRow.id == key_id))).one_or_none()
    if row is None:
        raise NotFound("API key not found.")
    return _key(row)


async def _revoke(tx: Tx, visible: Select[*tuple[Any, ...]], key_id: str) -> ApiKey:
    stored = await _retrieve(tx, visible.with_for_update(of=ApiKeyRow), key_id)
    if stored.revoked_at is not None:
        return stored
    await tx.execute(update(ApiKeyRow).where(ApiKeyRow.id == key_id).values(revoked_at=func.now()))
    await ring(tx, key_id)
    return await _retrieve(tx, visible, key_id)


async def _live_workspace(tx: Tx, reach: Reach, workspace_id: str) -> None:
    """Lock a workspace that may get one more live key. Raises `NotFound`, `InvalidRequest`."""
    workspace = await retrieve_within(tx, reach, workspace_id, lock=True)
    if workspace.archived_at is not None:
        raise InvalidRequest("workspace_id: the workspace is archived")
    await _count_below_limit(tx, workspace_id)


async def _count_below_limit(tx: Tx, workspace_id: str) -> None:
    await tx.execute(select(WorkspaceRow.id).where(WorkspaceRow.id == workspace_id).with_for_update(key_share=True))
    active = select(func.count()).select_from(ApiKeyRow).where(ApiKeyRow.workspace_id == workspace_id, _STATUS == "active")
    if (await tx.scalar(active) or 0) >= limits.KEYS_ACTIVE_MAX:
        raise InvalidRequest(
            f"A workspace has at most {limits.KEYS_ACTIVE_MAX} active keys", error_code="workspace_api_key_limit_exceeded"
        )


async def _future(tx: Tx, expires_at: datetime | None) -> datetime | None:
    if expires_at is not None and not await tx.scalar(select(literal(expires_at) > func.now())):
        raise InvalidRequest("expires_at: must be in the future")
    return expires_at


async def _check_environment(tx: Tx, workspace_id: str, environment_id: str, *, live: bool) -> None:
    if not ids.has_prefix(environment_id, ids.ENVIRONMENT):
        raise _no_environment()
    statement = select(EnvironmentRow.archived_at).where(
        EnvironmentRow.id == environment_id, EnvironmentRow.workspace_id == workspace_id
    )
    row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise _no_environment()
    if live and row.archived_at is not None:
        raise InvalidRequest("The environment is archived", error_code="environment_archived")


def _no_environment() -> NotFound:
    return NotFound("Environment not found.", error_code="environment_not_found")


async def _insert(tx: Tx, key_id: str, scope: Scope, secret: SecretStr, hmac_key: bytes, values: dict[str, Any]) -> ApiKey:
    shown = secret.get_secret_value()
    await tx.execute(
        insert(ApiKeyRow).values(
            id=key_id,
            scope=scope.name.lower(),
            secret_hmac=digest_of(shown, hmac_key),
            hint=shown[-HINT_CHARS:],
            **values,
        )
    )
    return await _retrieve(tx, _SELECT, key_id)
