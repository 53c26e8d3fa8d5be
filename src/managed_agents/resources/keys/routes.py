"""`/v1/organizations/api_keys`, and the keys of an environment. The create calls are this server's own."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.keys import service
from managed_agents.resources.keys.answers import EnvironmentKey, NewEnvironmentKey, NewKey
from managed_agents.resources.keys.rights import forget
from managed_agents.resources.keys.schemas import CreateEnvironmentKey, CreateKey, ListKeysQuery, UpdateKey
from managed_agents.resources.services import services
from managed_agents.web.actor import Scope
from managed_agents.web.auth import Administrator, StrictAdministrator
from managed_agents.web.object_pages import ObjectPageQuery
from managed_agents.web.operation import Answer, Shape, operation
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(tags=["keys"])

KEYS = "/v1/organizations/api_keys"
ENVIRONMENT_KEYS = "/v1/environments/{environment_id}/keys"
KEY = "organization.BetaAPIKey"
NOT_STORED = {"cache-control": "no-store"}  # of answers that hold a secret


@router.post(KEYS)
@operation(Answer(own=NewKey, secret=True))
async def create(request: Request, actor: Administrator, db: Db, command: CreateKey) -> Response:
    made = await service.create(
        db,
        services(request).keys.hmac_key,
        workspace_id=command.workspace_id or actor.workspace_id,
        name=command.name,
        scope=Scope.named(command.access_scope),
        expires_at=command.expires_at,
        reach=actor.reach,
    )
    return Json(made.body(), headers=NOT_STORED)


@router.get(KEYS)
@operation(Answer(KEY, Shape.PAGE_OF_OBJECTS))
async def list_keys(actor: Administrator, db: Db, asked: ListKeysQuery) -> Response:
    return Json(await service.page(db, actor.reach, asked))


@router.get(KEYS + "/{api_key_id}")
@operation(Answer(KEY))
async def retrieve(api_key_id: str, actor: Administrator, db: Db) -> Response:
    return Json((await service.retrieve(db, actor.reach, api_key_id)).body())


@router.post(KEYS + "/{api_key_id}")
@operation(Answer(KEY))
async def update(request: Request, api_key_id: str, actor: Administrator, db: Db, command: UpdateKey) -> Response:
    updated = await service.update_key(db, actor.reach, api_key_id, command)
    forget(services(request).keys, api_key_id)
    return Json(updated.body())


@router.post(ENVIRONMENT_KEYS)
@operation(Answer(own=NewEnvironmentKey, secret=True))
async def create_for_environment(
    request: Request, environment_id: str, actor: StrictAdministrator, db: Db, command: CreateEnvironmentKey
) -> Response:
    made = await service.create_for_environment(
        db,
        services(request).keys.hmac_key,
        actor.workspace_id,
        environment_id,
        name=command.name,
        expires_at=command.expires_at,
    )
    return Json(made.body(), headers=NOT_STORED)


@router.get(ENVIRONMENT_KEYS)
@operation(Answer(own=EnvironmentKey, shape=Shape.PAGE_OF_OBJECTS))
async def list_of_environment(environment_id: str, actor: StrictAdministrator, db: Db, asked: ObjectPageQuery) -> Response:
    return Json(await service.page_of_environment(db, actor.workspace_id, environment_id, asked))


@router.post(ENVIRONMENT_KEYS + "/{key_id}/archive")
@operation(Answer(own=EnvironmentKey))
async def archive_of_environment(
    request: Request, environment_id: str, key_id: str, actor: StrictAdministrator, db: Db
) -> Response:
    archived = await service.revoke_of_environment(db, actor.workspace_id, environment_id, key_id)
    forget(services(request).keys, key_id)
    return Json(archived.body())
