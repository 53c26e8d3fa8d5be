"""Workspaces: create and list them, and the pair every installation starts with."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from managed_agents.core.errors import Conflict, InvalidRequest, NotFound
from managed_agents.core.ids import ORGANIZATION, WORKSPACE, OrganizationId, WorkspaceId, new_id
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.organizations.tables import OrganizationRow, WorkspaceRow

DEFAULT_NAME = "default"
NAME_CHARS_MAX = 256


@dataclass(frozen=True, slots=True)
class Workspace:
    """A workspace and the organisation it belongs to."""

    id: WorkspaceId
    organization_id: OrganizationId
    name: str
    created_at: datetime


async def ensure_default_workspace(tx: Tx) -> Workspace:
    """Return the oldest workspace, made with its organisation when there is none.

    Callers that may run at the same time hold a lock (`keys.service.bootstrap`).
    """
    existing = await _oldest(tx)
    if existing is not None:
        return existing
    organization_id = new_id(ORGANIZATION)
    await tx.execute(insert(OrganizationRow).values(id=organization_id, name=DEFAULT_NAME))
    values = {"id": new_id(WORKSPACE), "organization_id": organization_id, "name": DEFAULT_NAME}
    await tx.execute(insert(WorkspaceRow).values(values))
    created = await _oldest(tx)
    assert created is not None
    return created


async def create_workspace(db: Database, name: str) -> Workspace:
    """Create a workspace in the installation's organisation. Raises `Conflict` when the name is taken."""
    if not 1 <= len(name) <= NAME_CHARS_MAX:
        raise InvalidRequest(f"name: must have 1 to {NAME_CHARS_MAX} characters")
    workspace_id = new_id(WORKSPACE)
    try:
        async with db.transaction() as tx:
            oldest = await _oldest(tx)
            if oldest is None:
                raise NotFound("There is no organisation yet; start the server once first.")
            values = {"id": workspace_id, "organization_id": oldest.organization_id, "name": name}
            await tx.execute(insert(WorkspaceRow).values(values))
            return await retrieve_workspace(tx, workspace_id)
    except IntegrityError as error:
        if "uq_workspaces_organization_id_name" not in str(error.orig):
            raise
        raise Conflict(f"name: a workspace named {name!r} exists already") from error


async def list_workspaces(db: Database) -> list[Workspace]:
    """Return all workspaces, oldest first."""
    async with db.transaction() as tx:
        rows = await tx.execute(_SELECT.order_by(WorkspaceRow.created_at, WorkspaceRow.id))
        return [_workspace(*row) for row in rows]


async def retrieve_workspace(tx: Tx, workspace_id: str) -> Workspace:
    """Return one workspace. Raises `NotFound`."""
    row = (await tx.execute(_SELECT.where(WorkspaceRow.id == workspace_id))).one_or_none()
    if row is None:
        raise NotFound("Workspace not found.")
    return _workspace(*row)


_SELECT = select(WorkspaceRow.id, WorkspaceRow.organization_id, WorkspaceRow.name, WorkspaceRow.created_at)


async def _oldest(tx: Tx) -> Workspace | None:
    rows = await tx.execute(_SELECT.order_by(WorkspaceRow.created_at, WorkspaceRow.id).limit(1))
    row = rows.one_or_none()
    return None if row is None else _workspace(*row)


def _workspace(id_: str, organization_id: str, name: str, created_at: datetime) -> Workspace:
    return Workspace(WorkspaceId(id_), OrganizationId(organization_id), name, created_at)
