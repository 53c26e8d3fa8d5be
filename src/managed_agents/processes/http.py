"""The HTTP connection: what uvicorn leaves open to hostile clients is closed here, and says so in the API's envelope.

Bounded: the head of a request in size and time, bytes that are neither head nor body (trailers, chunk extensions), the time an
answered request may go on sending its body, the time a reader may take nothing, the number of connections. Broken HTTP is a
400 like every other.
"""

import asyncio
from asyncio import TimerHandle
from collections.abc import Callable
from http.client import responses

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from managed_agents.core import limits
from managed_agents.core.errors import ApiError, InvalidRequest
from managed_agents.core.ids import REQUEST, new_id
from managed_agents.web.errors import envelope

TOO_MANY_CONNECTIONS = ApiError(529, "overloaded_error", "Overloaded: too many connections", headers={"retry-after": "1"})
TOO_SLOW = ApiError(408, "timeout_error", "the head of the request arrived too slowly")
TOO_LARGE = ApiError(431, "invalid_request_error", f"the head of the request exceeds {limits.HEAD_BYTES_MAX // 1024} KB")
BROKEN = InvalidRequest("malformed HTTP request")


class Connection(HttpToolsProtocol):
    """One connection of a client."""

    connections_max = 2000

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._unread_bytes = 0  # since the last sign that the request goes on
        self._head_bytes = 0
        self._refused = False
        self._timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        if len(self.connections) > self.connections_max:
            self._refuse(TOO_MANY_CONNECTIONS)
        else:
            self._expect(self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._unread_bytes += len(data)
        super().data_received(data)
        if not self._refused and self._unread_bytes > limits.HEAD_BYTES_MAX:
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._expect(self._too_slow)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if not self._refused:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unread_bytes = 0
        self._expect(None)
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread_bytes = 0
        if self._refused:
            return
        super().on_message_complete()
        if self.cycle.response_complete:
            self._expect(None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Answered before its body had arrived: the rest is thrown away, for a while.
        if self.cycle.more_body and not self.transport.is_closing():
            self._expect(self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(limits.SEND_STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            self._refuse(BROKEN)

    def _count(self, more: int) -> None:
        self._head_bytes += more
        if self._head_bytes > limits.HEAD_BYTES_MAX and not self._refused:
            self._refuse(TOO_LARGE)

    def _too_slow(self) -> None:
        if not self._refused:
            self._refuse(TOO_SLOW)

    def _expect(self, otherwise: Callable[[], None] | None) -> None:
        """Call `otherwise` unless this is called again in time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if otherwise is None else self.loop.call_later(limits.HEAD_SECONDS_MAX, otherwise)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer outside of the application, and close. In the middle of another answer there is only the closing."""
        self._refused = True
        self._expect(None)
        if self.cycle is None or self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self.transport.write(_answer(error))
        self.transport.close()


def connection(connections_max: int) -> type[Connection]:
    """Return the protocol of a process that takes `connections_max` connections."""
    return type("Connection", (Connection,), {"connections_max": connections_max})


def _answer(error: ApiError) -> bytes:
    request_id = new_id(REQUEST)
    body = envelope(error, request_id)
    phrase = responses.get(error.status, error.error_type)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "request-id": request_id,
        **error.headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {error.status} {phrase}\r\n{head}\r\n".encode() + body
