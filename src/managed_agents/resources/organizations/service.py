"""The organisation and its workspaces, and the pair every installation starts with.

Invariant: an organisation has one default workspace, which is never archived; an archived workspace has no live key.
Race: creating workspaces side by side, or keys while their workspace is archived; the organisation's or the workspace's row
is locked first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from managed_agents.core import clock, ids, limits
from managed_agents.core.errors import Conflict, InvalidRequest, NotFound, PermissionDenied
from managed_agents.core.ids import ORGANIZATION, WORKSPACE, OrganizationId, WorkspaceId, new_id
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.keys.rights import ring
from managed_agents.resources.keys.tables import ApiKeyRow
from managed_agents.resources.organizations import served
from managed_agents.resources.organizations.schemas import (
    NAME_CHARS_MAX,
    CreateWorkspace,
    ListWorkspacesQuery,
    UpdateWorkspace,
)
from managed_agents.resources.organizations.tables import DISPLAY_COLOR, OrganizationRow, WorkspaceRow
from managed_agents.web.actor import Reach
from managed_agents.web.object_pages import object_page

DEFAULT_NAME = "default"
TAG_PREFIX_RESERVED = "anthropic"  # spec: Workspace.tags


@dataclass(frozen=True, slots=True)
class Workspace:
    """A workspace and the organisation it belongs to."""

    id: WorkspaceId
    organization_id: OrganizationId
    name: str
    is_default: bool
    display_color: str
    tags: Mapping[str, str]
    created_at: datetime
    archived_at: datetime | None

    def body(self) -> dict[str, Any]:
        """Return the object as shown to clients (spec: Workspace)."""
        return {
            "id": self.id,
            "type": "workspace",
            "name": self.name,
            "display_color": self.display_color,
            "data_residency": served.DATA_RESIDENCY,
            "tags": dict(self.tags),
            "external_key_id": None,
            "user_profile_id": None,
            "compartment_id": ids.derived_id(ids.COMPARTMENT, self.id),
            "created_at": clock.millis(self.created_at),
            "archived_at": None if self.archived_at is None else clock.millis(self.archived_at),
        }


async def organization(db: Database, organization_id: str) -> dict[str, Any]:
    """Return the organisation as shown to clients (spec: OrganizationInfo)."""
    async with db.autocommit() as tx:
        name = await tx.scalar(select(OrganizationRow.name).where(OrganizationRow.id == organization_id))
    return {"id": organization_id, "type": "organization", "name": name}


async def ensure_default_workspace(tx: Tx) -> Workspace:
    """Return the default workspace, made with its organisation when there is none.

    Callers that may run at the same time hold a lock (`keys.service.bootstrap`).
    """
    existing = await _default(tx)
    if existing is not None:
        return existing
    organization_id = new_id(ORGANIZATION)
    await tx.execute(insert(OrganizationRow).values(id=organization_id, name=DEFAULT_NAME))
    values = {"id": new_id(WORKSPACE), "organization_id": organization_id, "name": DEFAULT_NAME, "is_default": True}
    await tx.execute(insert(WorkspaceRow).values(values))
    created = await _default(tx)
    assert created is not None
    return created


async def default_workspace(db: Database) -> Workspace:
    """Return the installation's default workspace. Raises `NotFound` before the first start."""
    async with db.autocommit() as tx:
        found = await _default(tx)
    if found is None:
        raise NotFound("There is no organisation yet; start the server once first.")
    return found


async def create_workspace(db: Database, name: str) -> Workspace:
    """Create a workspace in the installation's organisation. Raises `Conflict` when the name is taken."""
    if not 1 <= len(name) <= NAME_CHARS_MAX:
        raise InvalidRequest(f"name: must have 1 to {NAME_CHARS_MAX} characters")
    default = await default_workspace(db)
    return await create(db, Reach(default.organization_id, None), CreateWorkspace(name=name))


async def create(db: Database, reach: Reach, command: CreateWorkspace) -> Workspace:
    """Create a workspace. Raises `Conflict` when the name is taken, `PermissionDenied` for one workspace's administrator."""
    organization_only(reach)
    served.check(command)
    workspace_id = new_id(WORKSPACE)
    values: dict[str, Any] = {
        "id": workspace_id,
        "organization_id": reach.organization_id,
        "name": command.name,
        "display_color": command.display_color or DISPLAY_COLOR,
        "tags": _checked_tags(command.tags or {}),
    }
    live = WorkspaceRow.organization_id == reach.organization_id, WorkspaceRow.archived_at.is_(None)
    try:
        async with db.transaction() as tx:
            await tx.execute(
                select(OrganizationRow.id).where(OrganizationRow.id == reach.organization_id).with_for_update(key_share=True)
            )
            if (
                await tx.scalar(select(func.count()).select_from(WorkspaceRow).where(*live)) or 0
            ) >= limits.WORKSPACES_ACTIVE_MAX:
                raise InvalidRequest(f"An organization has at most {limits.WORKSPACES_ACTIVE_MAX} active workspaces")
            await tx.execute(insert(WorkspaceRow).values(values))
            return await retrieve_workspace(tx, workspace_id)
    except IntegrityError as error:
        raise _translated(error, command.name) from error


async def list_workspaces(db: Database) -> list[Workspace]:
    """Return all workspaces, oldest first; for operators."""
    async with db.autocommit() as tx:
        rows = await tx.execute(_SELECT.order_by(WorkspaceRow.created_at, WorkspaceRow.id))
        return [_workspace(*row) for row in rows]


async def page(db: Database, reach: Reach, query: ListWorkspacesQuery) -> dict[str, Any]:
    """Return a page, newest first."""
    visible = _within(reach)
    statement = visible
    if not query.include_archived:
        statement = statement.where(WorkspaceRow.archived_at.is_(None))
    if not query.include_default:
        statement = statement.where(~WorkspaceRow.is_default)
    if query.ids is not None:
        statement = statement.where(WorkspaceRow.id.in_(query.ids))
    async with db.autocommit() as tx:
        return await object_page(
            tx,
            statement,
            visible,
            query,
            created_at=WorkspaceRow.created_at.expression,
            id_=WorkspaceRow.id.expression,
            shown=lambda row: _workspace(*row).body(),
        )


async def retrieve_workspace(tx: Tx, workspace_id: str) -> Workspace:
    """Return one workspace. Raises `NotFound`."""
    row = (await tx.execute(_SELECT.where(WorkspaceRow.id == workspace_id))).one_or_none()
    if row is None:
        raise _not_found()
    return _workspace(*row)


async def retrieve_within(tx: Tx, reach: Reach, workspace_id: str, *, lock: bool = False) -> Workspace:
    """Return a workspace that the administrator may see; `lock` keeps it as it is. Raises `NotFound`."""
    if not ids.has_prefix(workspace_id, ids.WORKSPACE):
        raise _not_found()
    statement = _within(reach).where(WorkspaceRow.id == workspace_id)
    if lock:
        statement = statement.with_for_update(key_share=True)
    row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise _not_found()
    return _workspace(*row)


async def retrieve(db: Database, reach: Reach, workspace_id: str) -> Workspace:
    """Return a workspace. Raises `NotFound`."""
    async with db.autocommit() as tx:
        return await retrieve_within(tx, reach, workspace_id)


async def update_workspace(db: Database, reach: Reach, workspace_id: str, command: UpdateWorkspace) -> Workspace:
    """Change a workspace. Raises `NotFound`, `Conflict` when the name is taken."""
    served.check(command)
    try:
        async with db.transaction() as tx:
            stored = await retrieve_within(tx, reach, workspace_id, lock=True)
            if stored.archived_at is not None:
                raise InvalidRequest("Cannot modify archived workspace")
            tags = dict(stored.tags)
            for tag, value in (command.tags or {}).items():
                if value is None:
                    tags.pop(tag, None)
                else:
                    tags[tag] = value
            values = {
                "name": command.name or stored.name,
                "display_color": command.display_color or stored.display_color,
                "tags": _checked_tags(tags),
            }
            await tx.execute(update(WorkspaceRow).where(WorkspaceRow.id == workspace_id).values(values))
            return await retrieve_workspace(tx, workspace_id)
    except IntegrityError as error:
        raise _translated(error, command.name or "") from error


async def archive(db: Database, reach: Reach, workspace_id: str) -> Workspace:
    """Archive a workspace and revoke all its keys, everywhere at once. Repeating is safe. Raises `NotFound`.

    What runs in it runs to its end; nobody can reach it any more.
    """
    async with db.transaction() as tx:
        stored = await retrieve_within(tx, reach, workspace_id, lock=True)
        organization_only(reach)
        if stored.is_default:
            raise InvalidRequest("The default workspace cannot be archived")
        if stored.archived_at is not None:
            return stored
        await tx.execute(update(WorkspaceRow).where(WorkspaceRow.id == workspace_id).values(archived_at=func.now()))
        keys = update(ApiKeyRow).where(ApiKeyRow.workspace_id == workspace_id, ApiKeyRow.revoked_at.is_(None))
        await tx.execute(keys.values(revoked_at=func.now()))
        await ring(tx, workspace_id)
        return await retrieve_workspace(tx, workspace_id)


_SELECT = select(
    WorkspaceRow.id,
    WorkspaceRow.organization_id,
    WorkspaceRow.name,
    WorkspaceRow.is_default,
    WorkspaceRow.display_color,
    WorkspaceRow.tags,
    WorkspaceRow.created_at,
    WorkspaceRow.archived_at,
)


def _within(reach: Reach) -> Select[*tuple[Any, ...]]:
    statement = _SELECT.where(WorkspaceRow.organization_id == reach.organization_id)
    if reach.workspace_id is not None:
        statement = statement.where(WorkspaceRow.id == reach.workspace_id)
    return statement


def organization_only(reach: Reach) -> None:
    """Refuse an administrator of one workspace, after what it may not even see was not found. Raises `PermissionDenied`."""
    if reach.workspace_id is not None:
        raise PermissionDenied(
            "This needs an admin key of the organization's default workspace", error_code="api_key_scope_missing"
        )


def _not_found() -> NotFound:
    return NotFound("Workspace not found.")


def _checked_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return a copy within the limits; assumed to be those of metadata."""
    if len(tags) > limits.METADATA_PAIRS_MAX:
        raise InvalidRequest(f"tags: at most {limits.METADATA_PAIRS_MAX} tags are allowed")
    for key, value in tags.items():
        shown = key[: limits.METADATA_KEY_CHARS_MAX]
        if not 1 <= len(key) <= limits.METADATA_KEY_CHARS_MAX:
            raise InvalidRequest(f"tags.{shown}: keys must have 1 to {limits.METADATA_KEY_CHARS_MAX} characters")
        if key.startswith(TAG_PREFIX_RESERVED):
            raise InvalidRequest(f"tags.{shown}: keys must not begin with `{TAG_PREFIX_RESERVED}`")
        if len(value) > limits.METADATA_VALUE_CHARS_MAX:
            raise InvalidRequest(f"tags.{shown}: values must have at most {limits.METADATA_VALUE_CHARS_MAX} characters")
    return dict(tags)


def _translated(error: IntegrityError, name: str) -> Exception:
    if "uq_workspaces_live_name" in str(error.orig):
        return Conflict(f"name: a workspace named {name!r} exists already")
    return error


async def _default(tx: Tx) -> Workspace | None:
    row = (await tx.execute(_SELECT.where(WorkspaceRow.is_default).order_by(WorkspaceRow.created_at).limit(1))).one_or_none()
    return None if row is None else _workspace(*row)


def _workspace(
    id_: str,
    organization_id: str,
    name: str,
    is_default: bool,
    display_color: str,
    tags: Mapping[str, str],
    created_at: datetime,
    archived_at: datetime | None,
) -> Workspace:
    return Workspace(
        WorkspaceId(id_), OrganizationId(organization_id), name, is_default, display_color, tags, created_at, archived_at
    )
