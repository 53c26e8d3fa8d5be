"""Agents over HTTP."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.agents import service
from managed_agents.resources.agents.schemas import (
    CreateAgent,
    ListAgentsQuery,
    ListVersionsQuery,
    RetrieveAgentQuery,
    UpdateAgent,
)
from managed_agents.web import body, query
from managed_agents.web.auth import Developer, Viewer
from managed_agents.web.models import QueryModel
from managed_agents.web.pagination import page_body
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/agents")


@router.post("")
async def create(request: Request, actor: Developer, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, CreateAgent)
    agent = await service.create(db, actor.workspace_id, command)
    return Json(agent.body())


@router.get("")
async def list_agents(request: Request, actor: Viewer, db: Db) -> Response:
    asked = query.parse(request, ListAgentsQuery)
    agents, cursor = await service.list_agents(db, actor.workspace_id, asked)
    return Json(page_body([agent.body() for agent in agents], cursor))


@router.get("/{agent_id}")
async def retrieve(agent_id: str, request: Request, actor: Viewer, db: Db) -> Response:
    asked = query.parse(request, RetrieveAgentQuery)
    agent = await service.retrieve(db, actor.workspace_id, agent_id, asked.version)
    return Json(agent.body())


@router.post("/{agent_id}")
async def update(agent_id: str, request: Request, actor: Developer, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, UpdateAgent)
    agent = await service.update_agent(db, actor.workspace_id, agent_id, command)
    return Json(agent.body())


@router.post("/{agent_id}/archive")
async def archive(agent_id: str, request: Request, actor: Developer, db: Db) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    agent = await service.archive(db, actor.workspace_id, agent_id)
    return Json(agent.body())


@router.get("/{agent_id}/versions")
async def list_versions(agent_id: str, request: Request, actor: Viewer, db: Db) -> Response:
    asked = query.parse(request, ListVersionsQuery)
    agents, cursor = await service.list_versions(db, actor.workspace_id, agent_id, asked)
    return Json(page_body([agent.body() for agent in agents], cursor))
