"""`/v1/organizations/api_keys`, and the keys of an environment. The create calls are this server's own."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.keys import service
from managed_agents.resources.keys.schemas import CreateEnvironmentKey, CreateKey, ListKeysQuery, UpdateKey
from managed_agents.resources.services import services
from managed_agents.web import body, query
from managed_agents.web.actor import Scope
from managed_agents.web.auth import Administrator, StrictAdministrator
from managed_agents.web.models import QueryModel
from managed_agents.web.object_pages import ObjectPageQuery
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(tags=["organization"])

KEYS = "/v1/organizations/api_keys"
ENVIRONMENT_KEYS = "/v1/environments/{environment_id}/keys"
SECRET_HEADERS = {"cache-control": "no-store"}  # of answers that hold a secret


@router.post(KEYS)
async def create(request: Request, actor: Administrator, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, CreateKey)
    made = await service.create(
        db,
        services(request).keys.hmac_key,
        workspace_id=command.workspace_id or actor.workspace_id,
        name=command.name,
        scope=Scope.named(command.access_scope),
        expires_at=command.expires_at,
        reach=actor.reach,
    )
    return Json(made.body(), headers=SECRET_HEADERS)


@router.get(KEYS)
async def list_keys(request: Request, actor: Administrator, db: Db) -> Response:
    return Json(await service.page(db, actor.reach, query.parse(request, ListKeysQuery)))


@router.get(KEYS + "/{api_key_id}")
async def retrieve(api_key_id: str, request: Request, actor: Administrator, db: Db) -> Response:
    query.parse(request, QueryModel)
    return Json((await service.retrieve(db, actor.reach, api_key_id)).body())


@router.post(KEYS + "/{api_key_id}")
async def update(api_key_id: str, request: Request, actor: Administrator, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, UpdateKey)
    return Json((await service.update_key(db, actor.reach, api_key_id, command)).body())


@router.post(ENVIRONMENT_KEYS)
async def create_for_environment(environment_id: str, request: Request, actor: StrictAdministrator, db: Db) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, CreateEnvironmentKey)
    made = await service.create_for_environment(
        db,
        services(request).keys.hmac_key,
        actor.workspace_id,
        environment_id,
        name=command.name,
        expires_at=command.expires_at,
    )
    return Json(made.body(), headers=SECRET_HEADERS)


@router.get(ENVIRONMENT_KEYS)
async def list_of_environment(environment_id: str, request: Request, actor: StrictAdministrator, db: Db) -> Response:
    asked = query.parse(request, ObjectPageQuery)
    return Json(await service.page_of_environment(db, actor.workspace_id, environment_id, asked))


@router.post(ENVIRONMENT_KEYS + "/{key_id}/archive")
async def archive_of_environment(
    environment_id: str, key_id: str, request: Request, actor: StrictAdministrator, db: Db
) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    return Json((await service.revoke_of_environment(db, actor.workspace_id, environment_id, key_id)).body())
