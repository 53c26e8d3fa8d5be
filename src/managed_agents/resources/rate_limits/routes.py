"""`/v1/organizations/rate_limits` and the overrides of workspaces."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.keys.rights import forget
from managed_agents.resources.rate_limits import service
from managed_agents.resources.rate_limits.schemas import (
    ListRateLimitsQuery,
    ListWorkspaceRateLimitsQuery,
    UpdateWorkspaceRateLimit,
)
from managed_agents.resources.services import services
from managed_agents.web.auth import Administrator, OrganizationViewer
from managed_agents.web.operation import Answer, Shape, operation
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/organizations", tags=["rate_limits"])

OF_WORKSPACE = "organization.workspaces.BetaWorkspaceRateLimit"


@router.get("/rate_limits")
@operation(Answer("organization.BetaOrganizationRateLimit", Shape.PAGE))
async def list_rate_limits(request: Request, actor: OrganizationViewer, asked: ListRateLimitsQuery) -> Response:
    return Json(service.organization_page(actor.organization_id, services(request).organization_limits, asked))


@router.get("/workspaces/{workspace_id}/rate_limits")
@operation(Answer(OF_WORKSPACE, Shape.PAGE))
async def list_workspace_rate_limits(
    request: Request, workspace_id: str, actor: Administrator, db: Db, asked: ListWorkspaceRateLimitsQuery
) -> Response:
    limits = services(request).organization_limits
    return Json(await service.workspace_page(db, actor.reach, workspace_id, limits, asked))


@router.post("/workspaces/{workspace_id}/rate_limits/{rate_limit_id}")
@operation(Answer(OF_WORKSPACE))
async def update_workspace_rate_limit(
    request: Request,
    workspace_id: str,
    rate_limit_id: str,
    actor: Administrator,
    db: Db,
    command: UpdateWorkspaceRateLimit,
) -> Response:
    limits = services(request).organization_limits
    updated = await service.update_workspace(db, actor.reach, workspace_id, rate_limit_id, limits, command)
    forget(services(request).keys, workspace_id)
    return Json(updated)
