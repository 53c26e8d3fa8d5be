"""Agents over HTTP."""

from fastapi import APIRouter
from starlette.responses import Response

from managed_agents.resources.agents import service
from managed_agents.resources.agents.schemas import (
    CreateAgent,
    ListAgentsQuery,
    ListVersionsQuery,
    RetrieveAgentQuery,
    UpdateAgent,
)
from managed_agents.resources.services import WebSearch
from managed_agents.web.auth import Developer, Viewer
from managed_agents.web.operation import Answer, Shape, operation
from managed_agents.web.pagination import page_body
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/agents", tags=["agents"])

AGENT = Answer("BetaManagedAgentsAgent")


@router.post("")
@operation(AGENT)
async def create(actor: Developer, db: Db, web_search: WebSearch, command: CreateAgent) -> Response:
    agent = await service.create(db, actor.workspace_id, command, web_search=web_search)
    return Json(agent.body())


@router.get("")
@operation(Answer("BetaManagedAgentsAgent", Shape.PAGE))
async def list_agents(actor: Viewer, db: Db, asked: ListAgentsQuery) -> Response:
    agents, cursor = await service.list_agents(db, actor.workspace_id, asked)
    return Json(page_body([agent.body() for agent in agents], cursor))


@router.get("/{agent_id}")
@operation(AGENT)
async def retrieve(agent_id: str, actor: Viewer, db: Db, asked: RetrieveAgentQuery) -> Response:
    agent = await service.retrieve(db, actor.workspace_id, agent_id, asked.version)
    return Json(agent.body())


@router.post("/{agent_id}")
@operation(AGENT)
async def update(agent_id: str, actor: Developer, db: Db, web_search: WebSearch, command: UpdateAgent) -> Response:
    agent = await service.update_agent(db, actor.workspace_id, agent_id, command, web_search=web_search)
    return Json(agent.body())


@router.post("/{agent_id}/archive")
@operation(AGENT)
async def archive(agent_id: str, actor: Developer, db: Db) -> Response:
    agent = await service.archive(db, actor.workspace_id, agent_id)
    return Json(agent.body())


@router.get("/{agent_id}/versions")
@operation(Answer("BetaManagedAgentsAgent", Shape.PAGE))
async def list_versions(agent_id: str, actor: Viewer, db: Db, asked: ListVersionsQuery) -> Response:
    agents, cursor = await service.list_versions(db, actor.workspace_id, agent_id, asked)
    return Json(page_body([agent.body() for agent in agents], cursor))
