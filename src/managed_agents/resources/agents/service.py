"""Agents: every effective change is a new version, past versions never change.

Invariant: `agents.version` names an existing row of `agent_versions`. Race: two updates at once. Both lock
the agent's row first and read the current version in a second statement: one statement with a join would,
after waiting for the lock, look for the new version in its old snapshot and find nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, insert, select, true, update

from managed_agents.core import clock, ids
from managed_agents.core.errors import Conflict, InvalidRequest, NotFound
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.agents.config import (
    AgentConfig,
    AgentSnapshot,
    resolve_identity,
    resolve_model,
    resolve_tools,
    same_tools,
    snapshot,
)
from managed_agents.resources.agents.schemas import (
    AgentReference,
    AgentWithOverrides,
    CreateAgent,
    ListAgentsQuery,
    ListVersionsQuery,
    SessionAgentUpdate,
    UpdateAgent,
)
from managed_agents.resources.agents.served import refuse_unserved
from managed_agents.resources.agents.tables import AgentRow, AgentVersionRow
from managed_agents.web import metadata, pagination

STALE = "Concurrent modification detected. Please fetch the latest version and retry."


@dataclass(frozen=True, slots=True)
class Agent:
    """One version of an agent."""

    id: str
    version: int
    config: AgentConfig
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None

    def body(self) -> dict[str, Any]:
        """Return the object as shown to clients."""
        return {
            "id": self.id,
            "type": "agent",
            **self.config,
            "version": self.version,
            "created_at": clock.millis(self.created_at),
            "updated_at": clock.millis(self.updated_at),
            "archived_at": None if self.archived_at is None else clock.millis(self.archived_at),
        }


async def create(db: Database, workspace_id: str, command: CreateAgent, *, web_search: bool) -> Agent:
    """Save a new agent as version 1. `web_search`: this server has a search provider."""
    refuse_unserved(
        tools=command.tools,
        mcp_servers=command.mcp_servers,
        skills=command.skills,
        multiagent=command.multiagent,
        web_search=web_search,
    )
    config = AgentConfig(
        name=command.name,
        description=command.description or None,
        model=resolve_model(command.model),
        system=command.system or None,
        tools=resolve_tools(command.tools),
        mcp_servers=[],
        skills=[],
        multiagent=None,
        metadata=metadata.checked(command.metadata),
        execution_identity=resolve_identity(command.execution_identity),
    )
    agent_id = ids.new_id(ids.AGENT)
    async with db.transaction() as tx:
        inserted = await tx.execute(
            insert(AgentRow).values(id=agent_id, workspace_id=workspace_id, version=1).returning(AgentRow.created_at)
        )
        created_at = inserted.scalar_one()
        await _insert_version(tx, workspace_id, agent_id, 1, config)
    return Agent(agent_id, 1, config, created_at, created_at, None)


async def retrieve(db: Database, workspace_id: str, agent_id: str, version: int | None) -> Agent:
    """Return the current version, or the one asked for. Raises `NotFound`."""
    _check_id(agent_id)
    async with db.transaction() as tx:
        agent = await _select_agent(tx, workspace_id, agent_id, version, no_version="Agent version not found.")
    return _required(agent)


async def update_agent(db: Database, workspace_id: str, agent_id: str, command: UpdateAgent, *, web_search: bool) -> Agent:
    """Save a new version if anything changes, else return the current one.

    Raises `NotFound`, `InvalidRequest` for an archived agent, `Conflict` for a stale `version` even when
    nothing would change.
    """
    refuse_unserved(
        tools=command.tools or (),
        mcp_servers=command.mcp_servers or (),
        skills=command.skills or (),
        multiagent=command.multiagent,
        web_search=web_search,
    )
    _check_id(agent_id)
    async with db.transaction() as tx:
        locked = await tx.scalar(
            select(AgentRow.id).where(AgentRow.id == agent_id, AgentRow.workspace_id == workspace_id).with_for_update()
        )
        agent = _required(await _select_agent(tx, workspace_id, agent_id) if locked is not None else None)
        if agent.archived_at is not None:
            raise InvalidRequest("Cannot modify archived agent")
        if "version" in command.model_fields_set and command.version != agent.version:
            # differs from other conflicts by its type: observed hosted behaviour
            raise Conflict(STALE, error_type="invalid_request_error")
        config = changed(agent.config, command)
        if config == agent.config and same_tools(config["tools"], agent.config["tools"]):
            return agent
        version = agent.version + 1
        updated_at = await _insert_version(tx, workspace_id, agent_id, version, config)
        await tx.execute(update(AgentRow).where(AgentRow.id == agent_id).values(version=version))
    return Agent(agent_id, version, config, agent.created_at, updated_at, None)


def changed(config: AgentConfig, command: UpdateAgent) -> AgentConfig:
    """Return `config` with what `command` sends: omitted keeps, null or empty clears, lists are replaced."""
    sent = command.model_fields_set
    result = config.copy()
    if "name" in sent:
        result["name"] = command.name
    if "model" in sent:
        result["model"] = resolve_model(command.model, config["model"])
    if "description" in sent:
        result["description"] = command.description or None
    if "system" in sent:
        result["system"] = command.system or None
    if "tools" in sent:
        result["tools"] = resolve_tools(command.tools or ())
    if "execution_identity" in sent:
        result["execution_identity"] = resolve_identity(command.execution_identity)
    if command.metadata is not None:
        result["metadata"] = metadata.merged(config["metadata"], command.metadata)
    return result


async def archive(db: Database, workspace_id: str, agent_id: str) -> Agent:
    """Make an agent read-only for good. Repeating keeps the first instant. The version stays."""
    _check_id(agent_id)
    async with db.transaction() as tx:
        archived = await tx.execute(
            update(AgentRow)
            .where(AgentRow.id == agent_id, AgentRow.workspace_id == workspace_id)
            .values(archived_at=func.coalesce(AgentRow.archived_at, func.now()))
        )
        return _required(await _select_agent(tx, workspace_id, agent_id) if archived.rowcount else None)


async def list_agents(db: Database, workspace_id: str, query: ListAgentsQuery) -> tuple[list[Agent], str | None]:
    """Return a page of current versions, newest agents first, and the cursor of the next page."""
    statement = _joined(AgentVersionRow.version == AgentRow.version).where(
        AgentRow.workspace_id == workspace_id,
        *pagination.created_between(AgentRow.created_at.expression, {"gte": query.created_at_gte, "lte": query.created_at_lte}),
    )
    if not query.include_archived:
        statement = statement.where(AgentRow.archived_at.is_(None))
    statement = pagination.newest_first(
        statement,
        AgentRow.created_at.expression,
        AgentRow.id.expression,
        listing="agents",
        page=query.page,
        limit=query.limit,
    )
    async with db.transaction() as tx:
        rows = (await tx.execute(statement)).all()
    cursor = pagination.next_page("agents", rows, query.limit)
    return [_agent(row) for row in rows[: query.limit]], cursor


async def list_versions(
    db: Database, workspace_id: str, agent_id: str, query: ListVersionsQuery
) -> tuple[list[Agent], str | None]:
    """Return a page of versions, newest first, and the cursor of the next page. Raises `NotFound`."""
    _check_id(agent_id)
    listing = f"agent_versions/{agent_id}"
    before = true()
    if query.page is not None:
        (last,) = pagination.decode_cursor(listing, query.page, (int,))
        before = AgentVersionRow.version < last
    statement = _joined(before).where(AgentRow.id == agent_id, AgentRow.workspace_id == workspace_id)
    statement = statement.order_by(AgentVersionRow.version.desc()).limit(query.limit + 1)
    async with db.transaction() as tx:
        rows = (await tx.execute(statement)).all()
    if not rows:
        raise _missing()
    agents = [_agent(row) for row in rows[: query.limit] if row.version is not None]
    more = len(rows) > query.limit
    return agents, pagination.encode_cursor(listing, [agents[-1].version]) if more else None


async def resolve_for_session(
    tx: Tx, workspace_id: str, reference: str | AgentReference | AgentWithOverrides, *, web_search: bool = False
) -> AgentSnapshot:
    """Return the effective agent a new session keeps.

    Raises `NotFound` naming what does not exist, `InvalidRequest` for an archived agent or a refused
    replacement.
    """
    if isinstance(reference, str):
        agent_id, version, path = reference, None, "agent"
    else:
        agent_id, version, path = reference.id, reference.version, "agent.id"
    agent = None
    if ids.has_prefix(agent_id, ids.AGENT):
        agent = await _select_agent(tx, workspace_id, agent_id, version, no_version=f"agent.version: {version} not found")
    if agent is None:
        raise NotFound(f"{path}: {agent_id[:100]} not found")
    if agent.archived_at is not None:
        raise InvalidRequest(f"{path}: agent {agent.id} is archived")
    config = agent.config
    if isinstance(reference, AgentWithOverrides):
        config = overridden(config, reference, web_search=web_search)
    return snapshot(agent.id, agent.version, config)


def overridden(config: AgentConfig, reference: AgentWithOverrides, *, web_search: bool) -> AgentConfig:
    """Return `config` with one session's replacements: each is taken whole, null or an empty list clears."""
    refuse_unserved(
        tools=reference.tools or (),
        mcp_servers=reference.mcp_servers or (),
        skills=reference.skills or (),
        web_search=web_search,
        prefix="agent.",
    )
    sent = reference.model_fields_set
    result = config.copy()
    if "model" in sent:
        if reference.model is None:
            raise InvalidRequest("agent.model: a model is required (agent_model_required)", error_code="agent_model_required")
        result["model"] = resolve_model(reference.model, path="agent.model")
    if "system" in sent:
        result["system"] = reference.system or None
    if "tools" in sent:
        result["tools"] = resolve_tools(reference.tools or (), prefix="agent.")
    return result


def updated_for_session(stored: AgentSnapshot, command: SessionAgentUpdate, *, web_search: bool) -> AgentSnapshot:
    """Return a session's agent with other tools: a list that was sent replaces the stored one."""
    refuse_unserved(tools=command.tools, mcp_servers=command.mcp_servers, web_search=web_search, prefix="agent.")
    result = stored.copy()
    if "tools" in command.model_fields_set:
        result["tools"] = resolve_tools(command.tools, prefix="agent.")
    return result


def _check_id(agent_id: str) -> None:
    if not ids.has_prefix(agent_id, ids.AGENT):
        raise _missing()


def _missing() -> NotFound:
    return NotFound("Agent not found.")


def _required(agent: Agent | None) -> Agent:
    if agent is None:
        raise _missing()
    return agent


async def _insert_version(tx: Tx, workspace_id: str, agent_id: str, version: int, config: AgentConfig) -> datetime:
    inserted = await tx.execute(
        insert(AgentVersionRow)
        .values(agent_id=agent_id, version=version, workspace_id=workspace_id, config=config)
        .returning(AgentVersionRow.created_at)
    )
    return inserted.scalar_one()


def _joined(version: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    """Agents with those of their versions that `version` accepts. An agent without any is one row without a version."""
    return select(
        AgentRow.id,
        AgentVersionRow.version,
        AgentVersionRow.config,
        AgentRow.created_at,
        AgentVersionRow.created_at.label("updated_at"),
        AgentRow.archived_at,
    ).outerjoin(AgentVersionRow, and_(AgentVersionRow.agent_id == AgentRow.id, version))


def _agent(row: Sequence[Any]) -> Agent:
    return Agent(*row)


async def _select_agent(
    tx: Tx, workspace_id: str, agent_id: str, version: int | None = None, *, no_version: str = ""
) -> Agent | None:
    """None when there is no such agent. Raises `NotFound` saying `no_version` when it has no such version."""
    wanted = AgentVersionRow.version == (AgentRow.version if version is None else version)
    statement = _joined(wanted).where(AgentRow.id == agent_id, AgentRow.workspace_id == workspace_id)
    row = (await tx.execute(statement)).one_or_none()
    if row is None:
        return None
    if row.version is None:
        raise NotFound(no_version)
    return _agent(row)
