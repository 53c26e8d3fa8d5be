"""`/v1/organizations/me` and `/v1/organizations/workspaces`."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.organizations import service
from managed_agents.resources.organizations.schemas import CreateWorkspace, ListWorkspacesQuery, UpdateWorkspace
from managed_agents.web import body, query
from managed_agents.web.auth import Administrator, OrganizationViewer
from managed_agents.web.models import QueryModel
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/organizations", tags=["organization"])


@router.get("/me")
async def me(request: Request, actor: OrganizationViewer, db: Db) -> Response:
    query.parse(request, QueryModel)
    return Json(await service.organization(db, actor.organization_id))


@router.post("/workspaces")
async def create(request: Request, actor: Administrator, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, CreateWorkspace)
    return Json((await service.create(db, actor.reach, command)).body())


@router.get("/workspaces")
async def list_workspaces(request: Request, actor: Administrator, db: Db) -> Response:
    return Json(await service.page(db, actor.reach, query.parse(request, ListWorkspacesQuery)))


@router.get("/workspaces/{workspace_id}")
async def retrieve(workspace_id: str, request: Request, actor: Administrator, db: Db) -> Response:
    query.parse(request, QueryModel)
    return Json((await service.retrieve(db, actor.reach, workspace_id)).body())


@router.post("/workspaces/{workspace_id}")
async def update(workspace_id: str, request: Request, actor: Administrator, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, UpdateWorkspace)
    return Json((await service.update_workspace(db, actor.reach, workspace_id, command)).body())


@router.post("/workspaces/{workspace_id}/archive")
async def archive(workspace_id: str, request: Request, actor: Administrator, db: Db) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    return Json((await service.archive(db, actor.reach, workspace_id)).body())
