"""`/v1/sessions` and below."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.services import services
from managed_agents.resources.sessions.schemas import (
    CreateSession,
    ListEvents,
    ListSessions,
    ListThreads,
    SendEvents,
    StreamEvents,
    UpdateSession,
)
from managed_agents.web.auth import Developer, Viewer
from managed_agents.web.operation import Answer, Shape, operation
from managed_agents.web.responses import Json
from managed_agents.web.sse import EventStream

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

SESSION = Answer("BetaManagedAgentsSession")


@router.post("")
@operation(SESSION)
async def create(request: Request, actor: Developer, command: CreateSession) -> Response:
    return Json(await services(request).sessions.create(actor.workspace_id, command))


@router.get("")
@operation(Answer("BetaManagedAgentsSession", Shape.PAGE_BOTH_WAYS))
async def list_(request: Request, actor: Viewer, wanted: ListSessions) -> Response:
    return Json(await services(request).sessions.page(actor.workspace_id, wanted))


@router.get("/{session_id}")
@operation(SESSION)
async def retrieve(request: Request, session_id: str, actor: Viewer) -> Response:
    return Json(await services(request).sessions.retrieve(actor.workspace_id, session_id))


@router.post("/{session_id}")
@operation(SESSION)
async def update(request: Request, session_id: str, actor: Developer, command: UpdateSession) -> Response:
    return Json(await services(request).sessions.update(actor.workspace_id, session_id, command))


@router.delete("/{session_id}")
@operation(Answer("BetaManagedAgentsDeletedSession"))
async def delete(request: Request, session_id: str, actor: Developer) -> Response:
    return Json(await services(request).sessions.delete(actor.workspace_id, session_id))


@router.post("/{session_id}/archive")
@operation(SESSION)
async def archive(request: Request, session_id: str, actor: Developer) -> Response:
    return Json(await services(request).sessions.archive(actor.workspace_id, session_id))


@router.post("/{session_id}/events")
@operation(Answer("sessions.BetaManagedAgentsSendSessionEvents"))
async def send(request: Request, session_id: str, actor: Developer, command: SendEvents) -> Response:
    answer = await services(request).events.send(actor.workspace_id, session_id, command)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/events")
@operation(Answer("sessions.BetaManagedAgentsSessionEvent", Shape.PAGE))
async def list_events(request: Request, session_id: str, actor: Viewer, wanted: ListEvents) -> Response:
    answer = await services(request).events.page(actor.workspace_id, session_id, wanted)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/events/stream")
@operation(Answer("sessions.BetaManagedAgentsStreamSessionEvents", Shape.STREAM))
async def stream_events(request: Request, session_id: str, actor: Viewer, wanted: StreamEvents) -> Response:
    frames = await services(request).events.stream(actor.workspace_id, session_id, wanted)
    return EventStream(frames)


@router.get("/{session_id}/threads")
@operation(Answer("sessions.BetaManagedAgentsSessionThread", Shape.PAGE))
async def list_threads(request: Request, session_id: str, actor: Viewer, wanted: ListThreads) -> Response:
    return Json(await services(request).events.threads(actor.workspace_id, session_id, wanted))


@router.get("/{session_id}/threads/{thread_id}")
@operation(Answer("sessions.BetaManagedAgentsSessionThread"))
async def retrieve_thread(request: Request, session_id: str, thread_id: str, actor: Viewer) -> Response:
    return Json(await services(request).events.thread(actor.workspace_id, session_id, thread_id))
