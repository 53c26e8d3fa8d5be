"""Environments over HTTP."""

from fastapi import APIRouter
from starlette.responses import Response

from managed_agents.resources.environments import service
from managed_agents.resources.environments.schemas import (
    CreateEnvironment,
    ListEnvironmentsQuery,
    UpdateEnvironment,
)
from managed_agents.web.auth import StrictDeveloper, StrictViewer
from managed_agents.web.operation import Answer, Shape, operation
from managed_agents.web.pagination import page_body
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/environments", tags=["environments"])

ENVIRONMENT = Answer("BetaEnvironment")


@router.post("")
@operation(ENVIRONMENT)
async def create(actor: StrictDeveloper, db: Db, command: CreateEnvironment) -> Response:
    environment = await service.create(db, actor.workspace_id, command)
    return Json(environment.body())


@router.get("")
@operation(Answer("BetaEnvironment", Shape.PAGE))
async def list_environments(actor: StrictViewer, db: Db, asked: ListEnvironmentsQuery) -> Response:
    environments, cursor = await service.list_environments(db, actor.workspace_id, asked)
    return Json(page_body([environment.body() for environment in environments], cursor))


@router.get("/{environment_id}")
@operation(ENVIRONMENT)
async def retrieve(environment_id: str, actor: StrictViewer, db: Db) -> Response:
    environment = await service.retrieve(db, actor.workspace_id, environment_id)
    return Json(environment.body())


@router.post("/{environment_id}")
@operation(ENVIRONMENT)
async def update(environment_id: str, actor: StrictDeveloper, db: Db, command: UpdateEnvironment) -> Response:
    environment = await service.update_environment(db, actor.workspace_id, environment_id, command)
    return Json(environment.body())


@router.post("/{environment_id}/archive")
@operation(ENVIRONMENT)
async def archive(environment_id: str, actor: StrictDeveloper, db: Db) -> Response:
    environment = await service.archive(db, actor.workspace_id, environment_id)
    return Json(environment.body())


@router.delete("/{environment_id}")
@operation(Answer("BetaEnvironmentDeleteResponse"))
async def delete(environment_id: str, actor: StrictDeveloper, db: Db) -> Response:
    await service.delete_environment(db, actor.workspace_id, environment_id)
    return Json({"id": environment_id, "type": "environment_deleted"})
