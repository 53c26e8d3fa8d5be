"""One client connection that speaks HTTP: requests to forward, or one CONNECT that makes it a tunnel.

Each request is judged by itself, and has a connection of its own to the server, so that nothing one request leaves behind can
become the beginning of another's.
"""

import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import anyio
import h11

from managed_agents.egress import request as requests
from managed_agents.egress.access_log import Outcome
from managed_agents.egress.connect import Unreachable
from managed_agents.egress.request import BadRequest, Target
from managed_agents.egress.wire import Wire, alone

HEAD_BYTES_MAX = 64 * 1024
HEAD_SECONDS_MAX = 30.0
SILENCE_SECONDS_MAX = 900.0  # an answer may take long to begin; a connection without a byte in either direction ends
REASONS = {
    400: "Bad Request",
    403: "Forbidden",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class Refused(Exception):
    """The gateway does not let this through; the message is for the sandbox."""

    def __init__(self, message: str, outcome: Outcome, *, status: int = 403) -> None:
        super().__init__(message)
        self.outcome: Outcome = outcome
        self.status = status


class Visit(Protocol):
    """What is known of one request while it lasts."""

    async def open(self, target: Target) -> Wire:
        """Raises: Refused, Unreachable."""
        ...

    def sent(self, size: int) -> None:
        """Raises: Refused when the budget is spent."""
        ...

    def received(self, size: int) -> None:
        """Raises: Refused when the budget is spent."""
        ...

    def close(self, outcome: Outcome) -> None: ...


Tunnel = Callable[[Wire, Wire, Visit], Awaitable[None]]


def refusal(status: int, message: str) -> bytes:
    """A complete answer after which the connection ends."""
    body = f"{message}\n".encode()
    # Of a refused CONNECT most programs show this line only.
    reason = message.rstrip(".") if status == 403 and message.isascii() else REASONS[status]
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


class HttpClient:
    """Serves one client connection."""

    def __init__(self, wire: Wire, visit: Callable[[bool, Target], Visit], tunnel: Tunnel) -> None:
        """`visit` opens the books on a request; it is told whether that is a tunnel, and where it goes."""
        self._wire, self._visit, self._tunnel = wire, visit, tunnel
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def serve(self, first: bytes) -> None:
        """Serve until either side has enough. Raises: OSError, TimeoutError."""
        self._connection.receive_data(first)
        while await self._one_request():
            self._connection.start_next_cycle()

    async def _event(self, seconds: float) -> h11.Event | None:
        """The next thing the client says; None when it may not say any more yet."""
        with anyio.fail_after(seconds):
            while True:
                event = self._connection.next_event()
                if event is not h11.NEED_DATA:
                    return event if isinstance(event, h11.Event) else None
                self._connection.receive_data(await self._wire.receive())

    async def _one_request(self) -> bool:
        """Returns whether another one may follow."""
        try:
            event = await self._event(HEAD_SECONDS_MAX)
        except h11.RemoteProtocolError as error:
            await self._answer(400, f"This is no HTTP request: {error}")
            return False
        if not isinstance(event, h11.Request):
            return False  # it went away
        is_tunnel = event.method == b"CONNECT"
        headers = list(event.headers)
        try:
            find = requests.tunnel_target if is_tunnel else requests.forward_target
            target = find(event.target, headers)
        except BadRequest as error:
            await self._answer(400, f"Bad request: {error}.")
            return False
        visit = self._visit(is_tunnel, target)
        outcome: Outcome = "unreachable"
        try:
            upstream = await visit.open(target)
            try:
                outcome = "allowed"
                if is_tunnel:
                    await self._connect(visit, upstream)
                    return False
                return await self._forward(visit, upstream, event, target)
            finally:
                upstream.close()
        except (Refused, Unreachable) as error:
            outcome = error.outcome
            await self._answer(error.status, str(error))
            return False
        finally:
            visit.close(outcome)

    async def _answer(self, status: int, message: str) -> None:
        if self._connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with anyio.fail_after(HEAD_SECONDS_MAX):
                await self._wire.send(refusal(status, message))

    async def _connect(self, visit: Visit, upstream: Wire) -> None:
        early, _ = self._connection.trailing_data
        self._connection.send_failed()  # from here on the bytes are none of its business
        with anyio.fail_after(HEAD_SECONDS_MAX):
            await self._wire.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if early:
                visit.sent(len(early))
                await upstream.send(early)
        await self._tunnel(self._wire, upstream, visit)

    # Forwarding

    async def _forward(self, visit: Visit, upstream: Wire, event: h11.Request, target: Target) -> bool:
        server = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
        headers = [(b"host", target.authority.encode())]
        headers += requests.forwarded(list(event.headers), also_without=[b"host", b"expect"])
        head = h11.Request(method=event.method, target=target.path, headers=[*headers, (b"connection", b"close")])
        await upstream.send(server.send(head))
        with alone():
            async with anyio.create_task_group() as group:
                group.start_soon(self._upload, visit, upstream, server)
                await self._download(visit, upstream, server)
                group.cancel_scope.cancel()
        ended = (self._connection.our_state, self._connection.their_state)
        return ended == (h11.DONE, h11.DONE)

    async def _upload(self, visit: Visit, upstream: Wire, server: h11.Connection) -> None:
        """Pass the request's body on. A server may answer and close before it has read it all."""
        if self._connection.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            await self._wire.send(self._connection.send(go_on) or b"")
        while True:
            try:
                event = await self._event(SILENCE_SECONDS_MAX)
                if isinstance(event, h11.Data):
                    visit.sent(len(event.data))
                    data = server.send(event)
                elif isinstance(event, h11.EndOfMessage):
                    data = server.send(h11.EndOfMessage())
                else:
                    return None
                await upstream.send(data or b"")
                if isinstance(event, h11.EndOfMessage):
                    return await self._until_gone()
            except (h11.RemoteProtocolError, h11.LocalProtocolError) as error:
                raise ConnectionAbortedError(f"the request's body is broken: {error}") from error

    async def _until_gone(self) -> None:
        """Watch for a client that does not wait for its answer: else a silent server would hold its connection."""
        await anyio.wait_readable(self._wire.socket)
        if not self._wire.socket.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("the client went away")

    async def _download(self, visit: Visit, upstream: Wire, server: h11.Connection) -> None:
        """Pass the answer on."""
        begun = False
        while True:
            try:
                event = server.next_event()
                if event is h11.NEED_DATA:
                    with anyio.fail_after(SILENCE_SECONDS_MAX):
                        server.receive_data(await upstream.receive())
                    continue
            except (h11.RemoteProtocolError, OSError) as error:
                if begun:
                    raise ConnectionAbortedError("the answer broke off") from error
                raise Unreachable(f"The server's answer is none: {error}", "unreachable") from error
            if isinstance(event, h11.Response):
                begun = True
                headers = requests.forwarded(list(event.headers))
                answer = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
                await self._send(answer)
            elif isinstance(event, h11.Data):
                visit.received(len(event.data))
                await self._send(event)
            elif isinstance(event, h11.EndOfMessage):
                return await self._send(h11.EndOfMessage())
            elif not isinstance(event, h11.InformationalResponse):
                raise Unreachable("The server closed the connection without an answer", "unreachable")

    async def _send(self, event: h11.Event) -> None:
        with anyio.fail_after(SILENCE_SECONDS_MAX):
            await self._wire.send(self._connection.send(event) or b"")
