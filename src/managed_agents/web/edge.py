"""The outermost layer of the application: request id, identity headers, the one place where failures become
answers.

Pure ASGI, so that streams pass through untouched. A failure after the answer has started cannot be told any
more: it is logged and the connection is cut, which the client sees as such.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from managed_agents.core import logs
from managed_agents.core.errors import ApiError
from managed_agents.core.ids import REQUEST, new_id
from managed_agents.web import intake
from managed_agents.web.actor import Actor
from managed_agents.web.errors import as_api_error, envelope, internal_error
from managed_agents.web.state import Admission

log = logging.getLogger(__name__)

REQUESTS = Counter("managed_agents_http_requests_total", "Requests answered.", ["method", "route", "status"])
SECONDS = Histogram(
    "managed_agents_http_request_seconds",
    "Time until an answer started.",
    ["method", "route"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)


def error_response(error: ApiError, request_id: str) -> Response:
    """Render `error`."""
    return Response(
        envelope(error, request_id),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )


async def http_exception_response(request: Request, error: Exception) -> Response:
    """Render what the router raises (404, 405)."""
    assert isinstance(error, HTTPException)
    return error_response(as_api_error(error) or internal_error(), request.state.request_id)


class Edge:
    """Wraps the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id(REQUEST)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        began = time.perf_counter()
        started = False

        async def annotate(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *_headers(request_id, state)]
                _observe(scope, message["status"], time.perf_counter() - began)
            await send(message)

        token = logs.request_id.set(request_id)
        try:
            await self._app(scope, receive, annotate)
        except ClientDisconnect:
            log.debug("the client went away before its request was complete")
        except Exception as error:
            if started:
                raise
            answer = as_api_error(error)
            if answer is None:
                log.exception("unexpected failure", extra={"path": scope["path"]})
                answer = internal_error()
            elif answer.status >= 500:
                log.warning("refused for lack of capacity", extra={"path": scope["path"], "cause": repr(error)})
            await error_response(answer, request_id)(scope, receive, annotate)
        finally:
            intake.release(scope)
            logs.request_id.reset(token)


def _headers(request_id: str, state: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """Return what the edge learned about a request: its id, whose key it was, what is left of the rate limit."""
    headers = [(b"request-id", request_id.encode())]
    actor: Actor | None = state.get("actor")
    admission: Admission | None = state.get("admission")
    if actor is not None:
        headers.append((b"anthropic-organization-id", actor.organization_id.encode()))
        headers.append((b"anthropic-workspace-id", actor.workspace_id.encode()))
    if admission is not None:
        headers.extend((name.encode(), value.encode()) for name, value in admission.headers().items())
    return headers


def _observe(scope: Scope, status: int, seconds: float) -> None:
    """Count an answer under its route's pattern, so that ids never become label values."""
    route = getattr(scope.get("route"), "path", "unknown")
    method = scope["method"] if route != "unknown" else "any"
    REQUESTS.labels(method, route, status).inc()
    SECONDS.labels(method, route).observe(seconds)
