"""`/v1/sessions` and below."""

from typing import Annotated

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from managed_agents.resources.services import services
from managed_agents.resources.sessions import resources_service as resources
from managed_agents.resources.sessions import threads_service as threads
from managed_agents.resources.sessions.access import SessionDeveloper, SessionViewer
from managed_agents.resources.sessions.schemas import (
    AddedResource,
    CreateSession,
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
from managed_agents.web.auth import Developer, Viewer
from managed_agents.web.operation import BODY, Answer, Shape, operation
from managed_agents.web.responses import Json
from managed_agents.web.sse import EventStream
from managed_agents.web.state import Db

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
async def retrieve(request: Request, session_id: str, actor: SessionViewer) -> Response:
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
async def send(request: Request, session_id: str, actor: SessionDeveloper, command: SendEvents) -> Response:
    answer = await services(request).events.send(actor.workspace_id, session_id, command)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/events")
@operation(Answer("sessions.BetaManagedAgentsSessionEvent", Shape.PAGE))
async def list_events(request: Request, session_id: str, actor: SessionViewer, wanted: ListEvents) -> Response:
    answer = await services(request).events.page(actor.workspace_id, session_id, wanted)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/events/stream")
@operation(Answer("sessions.BetaManagedAgentsStreamSessionEvents", Shape.STREAM))
async def stream_events(request: Request, session_id: str, actor: SessionViewer, wanted: StreamEvents) -> Response:
    frames = await services(request).events.stream(actor.workspace_id, session_id, wanted)
    return EventStream(frames)


@router.get("/{session_id}/threads")
@operation(Answer("sessions.BetaManagedAgentsSessionThread", Shape.PAGE))
async def list_threads(session_id: str, actor: Viewer, db: Db, wanted: ListThreads) -> Response:
    return Json(await threads.page(db, actor.workspace_id, session_id, wanted))


@router.get("/{session_id}/threads/{thread_id}")
@operation(Answer("sessions.BetaManagedAgentsSessionThread"))
async def retrieve_thread(session_id: str, thread_id: str, actor: Viewer, db: Db) -> Response:
    return Json(await threads.retrieve(db, actor.workspace_id, session_id, thread_id))


@router.post("/{session_id}/threads/{thread_id}/archive")
@operation(Answer("sessions.BetaManagedAgentsSessionThread"))
async def archive_thread(request: Request, session_id: str, thread_id: str, actor: Developer, db: Db) -> Response:
    hints = services(request).sessions.hints
    return Json(await threads.archive(db, hints, actor.workspace_id, session_id, thread_id))


@router.get("/{session_id}/threads/{thread_id}/events")
@operation(Answer("sessions.BetaManagedAgentsSessionEvent", Shape.PAGE))
async def list_thread_events(
    request: Request, session_id: str, thread_id: str, actor: Viewer, asked: ListThreadEvents
) -> Response:
    wanted = ListEvents.model_validate(asked.model_dump())  # asc, unfiltered: a thread's list has no more parameters
    answer = await services(request).events.page(actor.workspace_id, session_id, wanted, thread_id=thread_id)
    return Response(answer, media_type="application/json")


@router.get("/{session_id}/threads/{thread_id}/stream")
@operation(Answer("sessions.BetaManagedAgentsStreamSessionThreadEvents", Shape.STREAM))
async def stream_thread_events(
    request: Request, session_id: str, thread_id: str, actor: Viewer, wanted: StreamEvents
) -> Response:
    frames = await services(request).events.stream(actor.workspace_id, session_id, wanted, thread_id=thread_id)
    return EventStream(frames)


@router.get("/{session_id}/resources")
@operation(Answer("sessions.BetaManagedAgentsSessionResource", Shape.PAGE))
async def list_resources(session_id: str, actor: Viewer, db: Db, wanted: ListResources) -> Response:
    return Json(await resources.page(db, actor.workspace_id, session_id, wanted))


@router.post("/{session_id}/resources")
@operation(Answer("sessions.BetaManagedAgentsFileResource"))
async def add_resource(
    request: Request, session_id: str, actor: Developer, db: Db, wanted: Annotated[AddedResource, BODY]
) -> Response:
    hints = services(request).sessions.hints
    return Json(await resources.add(db, hints, actor.workspace_id, session_id, wanted))


@router.get("/{session_id}/resources/{resource_id}")
@operation(Answer("sessions.BetaManagedAgentsSessionResource"))
async def retrieve_resource(session_id: str, resource_id: str, actor: Viewer, db: Db) -> Response:
    return Json(await resources.retrieve(db, actor.workspace_id, session_id, resource_id))


@router.post("/{session_id}/resources/{resource_id}")
@operation(Answer("sessions.BetaManagedAgentsSessionResource"))
async def update_resource(
    request: Request, session_id: str, resource_id: str, actor: Developer, db: Db, command: RotateToken
) -> Response:
    sealing = services(request).sessions.sealing
    return Json(await resources.rotate_token(db, sealing, actor.workspace_id, session_id, resource_id, command))


@router.delete("/{session_id}/resources/{resource_id}")
@operation(Answer("sessions.BetaManagedAgentsDeleteSessionResource"))
async def delete_resource(request: Request, session_id: str, resource_id: str, actor: Developer, db: Db) -> Response:
    hints = services(request).sessions.hints
    return Json(await resources.delete_resource(db, hints, actor.workspace_id, session_id, resource_id))
