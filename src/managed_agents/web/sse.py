"""Server-sent events: one response class for streams of ready-made frames.

The frames are bytes that all subscribers share, so nothing is encoded here. The response ends when the frames end, when the
client goes away, when its key is revoked, or when the client has not read for too long; the source is closed in every case.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from managed_agents.core import limits
from managed_agents.core.errors import AuthenticationFailed
from managed_agents.web import intake
from managed_agents.web.errors import envelope
from managed_agents.web.state import edge_services

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # no buffering proxy may sit on it
}


@asynccontextmanager
async def _counted(scope: Scope) -> AsyncGenerator[None]:
    with intake.counted_stream(scope):
        yield


class EventStream(Response):
    """Sends `frames` as they come."""

    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        last = b""
        async with aclosing(self._frames), _counted(scope), anyio.create_task_group() as group:
            reading = anyio.CancelScope()

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            async def heed_rights() -> None:
                nonlocal last
                await edge_services(request).keys.lost(request.state.actor)
                last = b"event: error\ndata: %b\n\n" % envelope(AuthenticationFailed(), request.state.request_id)
                reading.cancel()

            group.start_soon(watch)
            group.start_soon(heed_rights)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            taken = True
            with reading:
                taken = await self._send_frames(send)
            if taken:
                with anyio.move_on_after(limits.SEND_STALL_SECONDS):
                    await send({"type": "http.response.body", "body": last, "more_body": False})
            group.cancel_scope.cancel()

    async def _send_frames(self, send: Send) -> bool:
        """Return whether the client took all of them."""
        async for chunk in self._frames:
            with anyio.move_on_after(limits.SEND_STALL_SECONDS) as slow:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if slow.cancelled_caught:
                return False
        return True
