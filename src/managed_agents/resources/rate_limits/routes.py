"""`/v1/organizations/rate_limits` and the overrides of workspaces."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.rate_limits import service
from managed_agents.resources.rate_limits.schemas import (
    ListRateLimitsQuery,
    ListWorkspaceRateLimitsQuery,
    UpdateWorkspaceRateLimit,
)
from managed_agents.resources.services import services
from managed_agents.web import body, query
from managed_agents.web.auth import Administrator, OrganizationViewer
from managed_agents.web.models import QueryModel
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/organizations", tags=["organization"])


@router.get("/rate_limits")
async def list_rate_limits(request: Request, actor: OrganizationViewer) -> Response:
    asked = query.parse(request, ListRateLimitsQuery)
    return Json(service.organization_page(actor.organization_id, services(request).organization_limits, asked))


@router.get("/workspaces/{workspace_id}/rate_limits")
async def list_workspace_rate_limits(workspace_id: str, request: Request, actor: Administrator, db: Db) -> Response:
    asked = query.parse(request, ListWorkspaceRateLimitsQuery)
    limits = services(request).organization_limits
    return Json(await service.workspace_page(db, actor.reach, workspace_id, limits, asked))


@router.post("/workspaces/{workspace_id}/rate_limits/{rate_limit_id}")
async def update_workspace_rate_limit(
    workspace_id: str, rate_limit_id: str, request: Request, actor: Administrator, db: Db
) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, UpdateWorkspaceRateLimit)
    limits = services(request).organization_limits
    return Json(await service.update_workspace(db, actor.reach, workspace_id, rate_limit_id, limits, command))
