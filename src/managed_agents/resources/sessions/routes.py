"""`/v1/sessions` and below."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.services import services
from managed_agents.resources.sessions.access import SessionDeveloper, SessionViewer
from managed_agents.resources.sessions.schemas import (
    CreateSession,
    ListEvents,
    ListSessions,
    ListThreads,
    SendEvents,
    StreamEvents,
    UpdateSession,
)
from managed_agents.web import body, query
from managed_agents.web.auth import Developer, Viewer
from managed_agents.web.models import QueryModel
from managed_agents.web.responses import Json
from managed_agents.web.sse import EventStream

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])


@router.post("")
async def create(request: Request, actor: Developer) -> Response:
    command = await body.parse(request, CreateSession)
    return Json(await services(request).sessions.create(actor.workspace_id, command))


@router.get("")
async def list_(request: Request, actor: Viewer) -> Response:
    return Json(await services(request).sessions.page(actor.workspace_id, query.parse(request, ListSessions)))


@router.get("/{session_id}")
async def retrieve(request: Request, session_id: str, actor: SessionViewer) -> Response:
    query.parse(request, QueryModel)
    return Json(await services(request).sessions.retrieve(actor.workspace_id, session_id))


@router.post("/{session_id}")
async def update(request: Request, session_id: str, actor: Developer) -> Response:
    command = await body.parse(request, UpdateSession)
    return Json(await services(request).sessions.update(actor.workspace_id, session_id, command))


@router.delete("/{session_id}")
async def delete(request: Request, session_id: str, actor: Developer) -> Response:
    return Json(await services(request).sessions.delete(actor.workspace_id, session_id))


@router.post("/{session_id}/archive")
async def archive(request: Request, session_id: str, actor: Developer) -> Response:
    await body.none(request)
    return Json(await services(request).sessions.archive(actor.workspace_id, session_id))


@router.post("/{session_id}/events")
async def send(request: Request, session_id: str, actor: SessionDeveloper) -> Response:
    command = await body.parse(request, SendEvents)
    answer = await services(request).events.send(actor.workspace_id, session_id, command)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/events")
async def list_events(request: Request, session_id: str, actor: SessionViewer) -> Response:
    wanted = query.parse(request, ListEvents)
    answer = await services(request).events.page(actor.workspace_id, session_id, wanted)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/events/stream")
async def stream_events(request: Request, session_id: str, actor: SessionViewer) -> Response:
    wanted = query.parse(request, StreamEvents)
    frames = await services(request).events.stream(actor.workspace_id, session_id, wanted)
    return EventStream(frames)


@router.get("/{session_id}/threads")
async def list_threads(request: Request, session_id: str, actor: Viewer) -> Response:
    wanted = query.parse(request, ListThreads)
    return Json(await services(request).events.threads(actor.workspace_id, session_id, wanted))


@router.get("/{session_id}/threads/{thread_id}")
async def retrieve_thread(request: Request, session_id: str, thread_id: str, actor: Viewer) -> Response:
    query.parse(request, QueryModel)
    return Json(await services(request).events.thread(actor.workspace_id, session_id, thread_id))
