"""`/v1/organizations/me` and `/v1/organizations/workspaces`."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.keys.rights import forget
from managed_agents.resources.organizations import service
from managed_agents.resources.organizations.schemas import CreateWorkspace, ListWorkspacesQuery, UpdateWorkspace
from managed_agents.resources.services import services
from managed_agents.web.auth import Administrator, OrganizationViewer
from managed_agents.web.operation import Answer, Shape, operation
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/organizations", tags=["organization"])

WORKSPACE = Answer("organization.BetaWorkspace")


@router.get("/me")
@operation(Answer("BetaOrganization"))
async def me(actor: OrganizationViewer, db: Db) -> Response:
    return Json(await service.organization(db, actor.organization_id))


@router.post("/workspaces")
@operation(WORKSPACE)
async def create_workspace(actor: Administrator, db: Db, command: CreateWorkspace) -> Response:
    return Json((await service.create(db, actor.reach, command)).body())


@router.get("/workspaces")
@operation(Answer(WORKSPACE.name, Shape.PAGE_OF_OBJECTS))
async def list_workspaces(actor: Administrator, db: Db, asked: ListWorkspacesQuery) -> Response:
    return Json(await service.page(db, actor.reach, asked))


@router.get("/workspaces/{workspace_id}")
@operation(WORKSPACE)
async def retrieve_workspace(workspace_id: str, actor: Administrator, db: Db) -> Response:
    return Json((await service.retrieve(db, actor.reach, workspace_id)).body())


@router.post("/workspaces/{workspace_id}")
@operation(WORKSPACE)
async def update_workspace(workspace_id: str, actor: Administrator, db: Db, command: UpdateWorkspace) -> Response:
    return Json((await service.update_workspace(db, actor.reach, workspace_id, command)).body())


@router.post("/workspaces/{workspace_id}/archive")
@operation(WORKSPACE)
async def archive_workspace(request: Request, workspace_id: str, actor: Administrator, db: Db) -> Response:
    archived = await service.archive(db, actor.reach, workspace_id)
    forget(services(request).keys, workspace_id)
    return Json(archived.body())
