"""`/v1/sessions` and below."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.services import services
from managed_agents.resources.sessions import resources_service as resources
from managed_agents.resources.sessions import threads_service as threads
from managed_agents.resources.sessions.schemas import (
    CreateSession,
    FileResourceBody,
    ListEvents,
    ListResources,
    ListSessions,
    ListThreadEvents,
    ListThreads,
    RotateToken,
    SendEvents,
    StreamEvents,
    UpdateSession,
)
from managed_agents.web import body, query
from managed_agents.web.auth import Developer, Viewer
from managed_agents.web.models import QueryModel
from managed_agents.web.responses import Json
from managed_agents.web.sse import EventStream
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])


@router.post("")
async def create(request: Request, actor: Developer) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, CreateSession)
    return Json(await services(request).sessions.create(actor.workspace_id, command))


@router.get("")
async def list_(request: Request, actor: Viewer) -> Response:
    return Json(await services(request).sessions.page(actor.workspace_id, query.parse(request, ListSessions)))


@router.get("/{session_id}")
async def retrieve(request: Request, session_id: str, actor: Viewer) -> Response:
    query.parse(request, QueryModel)
    return Json(await services(request).sessions.retrieve(actor.workspace_id, session_id))


@router.post("/{session_id}")
async def update(request: Request, session_id: str, actor: Developer) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, UpdateSession)
    return Json(await services(request).sessions.update(actor.workspace_id, session_id, command))


@router.delete("/{session_id}")
async def delete(request: Request, session_id: str, actor: Developer) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    return Json(await services(request).sessions.delete(actor.workspace_id, session_id))


@router.post("/{session_id}/archive")
async def archive(request: Request, session_id: str, actor: Developer) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    return Json(await services(request).sessions.archive(actor.workspace_id, session_id))


@router.post("/{session_id}/events")
async def send(request: Request, session_id: str, actor: Developer) -> Response:
    query.parse(request, QueryModel)
    command = await body.parse(request, SendEvents)
    answer = await services(request).events.send(actor.workspace_id, session_id, command)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/events")
async def list_events(request: Request, session_id: str, actor: Viewer) -> Response:
    wanted = query.parse(request, ListEvents)
    answer = await services(request).events.page(actor.workspace_id, session_id, wanted)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/events/stream")
async def stream_events(request: Request, session_id: str, actor: Viewer) -> Response:
    query.parse(request, StreamEvents)
    frames = await services(request).events.stream(actor.workspace_id, session_id)
    return EventStream(frames)


@router.get("/{session_id}/threads")
async def list_threads(request: Request, session_id: str, actor: Viewer, db: Db) -> Response:
    wanted = query.parse(request, ListThreads)
    return Json(await threads.page(db, actor.workspace_id, session_id, wanted))


@router.get("/{session_id}/threads/{thread_id}")
async def retrieve_thread(request: Request, session_id: str, thread_id: str, actor: Viewer, db: Db) -> Response:
    query.parse(request, QueryModel)
    return Json(await threads.retrieve(db, actor.workspace_id, session_id, thread_id))


@router.post("/{session_id}/threads/{thread_id}/archive")
async def archive_thread(request: Request, session_id: str, thread_id: str, actor: Developer, db: Db) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    hints = services(request).sessions.hints
    return Json(await threads.archive(db, hints, actor.workspace_id, session_id, thread_id))


@router.get("/{session_id}/threads/{thread_id}/events")
async def list_thread_events(request: Request, session_id: str, thread_id: str, actor: Viewer) -> Response:
    asked = query.parse(request, ListThreadEvents)
    wanted = ListEvents.model_validate(asked.model_dump())  # asc, unfiltered: a thread's list has no more parameters
    answer = await services(request).events.page(actor.workspace_id, session_id, wanted, thread_id=thread_id)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/threads/{thread_id}/stream")
async def stream_thread_events(request: Request, session_id: str, thread_id: str, actor: Viewer) -> Response:
    query.parse(request, StreamEvents)
    return EventStream(await services(request).events.stream(actor.workspace_id, session_id, thread_id=thread_id))


@router.get("/{session_id}/resources")
async def list_resources(request: Request, session_id: str, actor: Viewer, db: Db) -> Response:
    wanted = query.parse(request, ListResources)
    return Json(await resources.page(db, actor.workspace_id, session_id, wanted))


@router.post("/{session_id}/resources")
async def add_resource(request: Request, session_id: str, actor: Developer, db: Db) -> Response:
    query.parse(request, QueryModel)
    wanted = (await body.parse(request, FileResourceBody)).root
    hints = services(request).sessions.hints
    return Json(await resources.add(db, hints, actor.workspace_id, session_id, wanted))


@router.get("/{session_id}/resources/{resource_id}")
async def retrieve_resource(request: Request, session_id: str, resource_id: str, actor: Viewer, db: Db) -> Response:
    query.parse(request, QueryModel)
    return Json(await resources.retrieve(db, actor.workspace_id, session_id, resource_id))


@router.post("/{session_id}/resources/{resource_id}")
async def update_resource(request: Request, session_id: str, resource_id: str, actor: Developer, db: Db) -> Response:
    query.parse(request, QueryModel)
    await body.parse(request, RotateToken)
    return Json(await resources.rotate_token(db, actor.workspace_id, session_id, resource_id))


@router.delete("/{session_id}/resources/{resource_id}")
async def delete_resource(request: Request, session_id: str, resource_id: str, actor: Developer, db: Db) -> Response:
    query.parse(request, QueryModel)
    await body.none(request)
    hints = services(request).sessions.hints
    return Json(await resources.delete_resource(db, hints, actor.workspace_id, session_id, resource_id))
