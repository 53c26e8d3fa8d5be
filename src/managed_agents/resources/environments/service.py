"""Environments: configuration for sandboxes made later. Changes reach only sandboxes made after them.

Race: deleting an environment while a session is made in it. The session's foreign key decides; whoever
comes second gets an error and nothing is half done.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from managed_agents.core import clock, ids
from managed_agents.core.errors import Conflict, InvalidRequest, NotFound
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.environments.config import DEFAULT, EnvironmentConfig, check_type_kept, merge
from managed_agents.resources.environments.schemas import (
    CreateEnvironment,
    ListEnvironmentsQuery,
    UpdateEnvironment,
)
from managed_agents.resources.environments.served import refuse_unserved
from managed_agents.resources.environments.tables import EnvironmentRow
from managed_agents.web import metadata, pagination

INVALID_METADATA = "invalid_metadata"
FOREIGN_KEY_VIOLATION = "23503"


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment."""

    id: str
    name: str
    description: str | None
    config: EnvironmentConfig
    metadata: dict[str, str]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None

    def body(self) -> dict[str, Any]:
        """Return the object as shown to clients."""
        return {
            "id": self.id,
            "type": "environment",
            "name": self.name,
            "description": self.description,
            "config": self.config,
            "metadata": self.metadata,
            "scope": "organization",
            "created_at": clock.millis(self.created_at),
            "updated_at": clock.millis(self.updated_at),
            "archived_at": None if self.archived_at is None else clock.millis(self.archived_at),
        }


async def create(db: Database, workspace_id: str, command: CreateEnvironment) -> Environment:
    """Save a new environment. Raises `Conflict` when a live one has the name."""
    _check_scope(command.scope)
    refuse_unserved(command.config)
    values = {
        "id": ids.new_id(ids.ENVIRONMENT),
        "workspace_id": workspace_id,
        "name": command.name,
        "description": command.description,
        "config": merge(DEFAULT, command.config),
        "metadata_": metadata.checked(command.metadata, error_code=INVALID_METADATA),
    }
    with _unique_name(command.name):
        async with db.transaction() as tx:
            inserted = await tx.execute(insert(EnvironmentRow).values(values).returning(*_COLUMNS))
            return _environment(inserted.one())


async def retrieve(db: Database, workspace_id: str, environment_id: str) -> Environment:
    """Return one environment. Raises `NotFound`."""
    async with db.transaction() as tx:
        environment = await _select(tx, workspace_id, environment_id)
    return _required(environment)


async def update_environment(db: Database, workspace_id: str, environment_id: str, command: UpdateEnvironment) -> Environment:
    """Apply a patch. Raises `NotFound`, `InvalidRequest` for an archived one, `Conflict` for a taken name."""
    _check_scope(command.scope)
    with _unique_name(command.name or ""):
        async with db.transaction() as tx:
            stored = _required(await _select(tx, workspace_id, environment_id, lock=True))
            if stored.archived_at is not None:
                raise _archived(f"Cannot modify archived environment {stored.id}")
            check_type_kept(command.config)
            refuse_unserved(command.config)
            sent = command.model_fields_set
            values = {
                "name": stored.name if command.name is None else command.name,
                "description": command.description if "description" in sent else stored.description,
                "config": merge(stored.config, command.config),
                "metadata_": metadata.merged(stored.metadata, command.metadata, empty_deletes=True, error_code=INVALID_METADATA),
                "updated_at": func.now(),
            }
            updated = await tx.execute(
                update(EnvironmentRow).where(EnvironmentRow.id == stored.id).values(values).returning(*_COLUMNS)
            )
            return _environment(updated.one())


async def archive(db: Database, workspace_id: str, environment_id: str) -> Environment:
    """Make an environment read-only for good; its sessions go on. Repeating keeps the first instant."""
    _check_id(environment_id)
    async with db.transaction() as tx:
        archived = await tx.execute(
            update(EnvironmentRow)
            .where(EnvironmentRow.id == environment_id, EnvironmentRow.workspace_id == workspace_id)
            .values(archived_at=func.coalesce(EnvironmentRow.archived_at, func.now()))
            .returning(*_COLUMNS)
        )
        row = archived.one_or_none()
    return _required(None if row is None else _environment(row))


async def delete_environment(db: Database, workspace_id: str, environment_id: str) -> None:
    """Delete an environment that no session refers to. Raises `NotFound`, `Conflict` when one does."""
    _check_id(environment_id)
    try:
        async with db.transaction() as tx:
            deleted = await tx.scalar(
                delete(EnvironmentRow)
                .where(EnvironmentRow.id == environment_id, EnvironmentRow.workspace_id == workspace_id)
                .returning(EnvironmentRow.id)
            )
    except IntegrityError as error:
        if getattr(error.orig, "sqlstate", None) != FOREIGN_KEY_VIOLATION:
            raise
        raise Conflict(f"Environment {environment_id} is in use by sessions; archive it instead.") from error
    if deleted is None:
        raise _missing()


async def list_environments(
    db: Database, workspace_id: str, query: ListEnvironmentsQuery
) -> tuple[list[Environment], str | None]:
    """Return a page, newest first, and the cursor of the next one."""
    statement = select(*_COLUMNS).where(EnvironmentRow.workspace_id == workspace_id)
    if not query.include_archived:
        statement = statement.where(EnvironmentRow.archived_at.is_(None))
    statement = pagination.newest_first(
        statement,
        EnvironmentRow.created_at.expression,
        EnvironmentRow.id.expression,
        listing="environments",
        page=query.page,
        limit=query.limit,
    )
    async with db.transaction() as tx:
        rows = (await tx.execute(statement)).all()
    cursor = pagination.next_page("environments", rows, query.limit)
    return [_environment(row) for row in rows[: query.limit]], cursor


async def usable_for_session(tx: Tx, workspace_id: str, environment_id: str) -> Environment:
    """Return the environment a new session names.

    Raises `NotFound` and, for an archived one, `InvalidRequest`, both naming `environment_id`.
    """
    environment = await _select(tx, workspace_id, environment_id, keep=True)
    if environment is None:
        raise NotFound(f"environment_id: {environment_id[:100]} not found", error_code="environment_not_found")
    if environment.archived_at is not None:
        raise _archived(f"environment_id: environment {environment.id} is archived")
    return environment


_COLUMNS = (
    EnvironmentRow.id,
    EnvironmentRow.name,
    EnvironmentRow.description,
    EnvironmentRow.config,
    EnvironmentRow.metadata_,
    EnvironmentRow.created_at,
    EnvironmentRow.updated_at,
    EnvironmentRow.archived_at,
)


def _environment(row: Sequence[Any]) -> Environment:
    return Environment(*row)


async def _select(
    tx: Tx, workspace_id: str, environment_id: str, *, lock: bool = False, keep: bool = False
) -> Environment | None:
    """`lock` is for who will change the row; `keep` only holds off its deletion until the transaction ends."""
    if not ids.has_prefix(environment_id, ids.ENVIRONMENT):
        return None
    statement = select(*_COLUMNS).where(EnvironmentRow.id == environment_id, EnvironmentRow.workspace_id == workspace_id)
    if lock:
        statement = statement.with_for_update()
    elif keep:
        statement = statement.with_for_update(read=True, key_share=True)
    row = (await tx.execute(statement)).one_or_none()
    return None if row is None else _environment(row)


def _required(environment: Environment | None) -> Environment:
    if environment is None:
        raise _missing()
    return environment


def _check_id(environment_id: str) -> None:
    if not ids.has_prefix(environment_id, ids.ENVIRONMENT):
        raise _missing()


def _missing() -> NotFound:
    return NotFound("Environment not found.", error_code="environment_not_found")


def _archived(message: str) -> InvalidRequest:
    return InvalidRequest(message, error_code="environment_archived")


def _check_scope(scope: str | None) -> None:
    if scope == "account":
        raise InvalidRequest('scope: "account" is not supported; environments belong to the organization')


@contextmanager
def _unique_name(name: str) -> Generator[None]:
    """Turn a violation of the name's index into the answer for it."""
    try:
        yield
    except IntegrityError as error:
        if "uq_environments_live_name" not in str(error.orig):
            raise
        raise Conflict(f"name: an environment named {name!r} exists already") from error
