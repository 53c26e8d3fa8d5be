"""Environments over HTTP."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.environments import service
from managed_agents.resources.environments.schemas import (
    CreateEnvironment,
    ListEnvironmentsQuery,
    UpdateEnvironment,
)
from managed_agents.web import body, query
from managed_agents.web.auth import StrictDeveloper, StrictViewer
from managed_agents.web.models import QueryModel
from managed_agents.web.pagination import page_body
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/environments")


@router.post("")
async def create(request: Request, actor: StrictDeveloper, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, CreateEnvironment)
    environment = await service.create(db, actor.workspace_id, command)
    return Json(environment.body())


@router.get("")
async def list_environments(request: Request, actor: StrictViewer, db: Db) -> Response:
    asked = query.parse(request, ListEnvironmentsQuery)
    environments, cursor = await service.list_environments(db, actor.workspace_id, asked)
    return Json(page_body([environment.body() for environment in environments], cursor))


@router.get("/{environment_id}")
async def retrieve(environment_id: str, request: Request, actor: StrictViewer, db: Db) -> Response:
    query.parse(request, QueryModel)
    environment = await service.retrieve(db, actor.workspace_id, environment_id)
    return Json(environment.body())


@router.post("/{environment_id}")
async def update(environment_id: str, request: Request, actor: StrictDeveloper, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, UpdateEnvironment)
    environment = await service.update_environment(db, actor.workspace_id, environment_id, command)
    return Json(environment.body())


@router.post("/{environment_id}/archive")
async def archive(environment_id: str, request: Request, actor: StrictDeveloper, db: Db) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    environment = await service.archive(db, actor.workspace_id, environment_id)
    return Json(environment.body())


@router.delete("/{environment_id}")
async def delete(environment_id: str, request: Request, actor: StrictDeveloper, db: Db) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    await service.delete_environment(db, actor.workspace_id, environment_id)
    return Json({"id": environment_id, "type": "environment_deleted"})
