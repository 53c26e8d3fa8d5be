"""Server-sent events: one response class for streams of ready-made frames.

The frames are bytes that all subscribers share, so nothing is encoded here. The response ends when the frames end, when the
client goes away, or when the client has not read for too long; the source is closed in every case.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from managed_agents.core import limits
from managed_agents.web import intake

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
        async with aclosing(self._frames), _counted(scope), anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._frames:
                with anyio.move_on_after(limits.SEND_STALL_SECONDS) as slow:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if slow.cancelled_caught:
                    break
            else:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            group.cancel_scope.cancel()
