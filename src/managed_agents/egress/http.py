"""One client connection that speaks HTTP: requests to forward, or one CONNECT that makes it a tunnel.

Each request is judged by itself. Forwarded ones have a connection of their own to the server, so that nothing one request leaves
behind can become the beginning of another's. The same serves the inside of a connection whose TLS was ended here: there every
request goes where the tunnel went, and may get credentials on its way; they share a connection while it is clean, and the
sandbox with nobody.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import anyio
import h11

from managed_agents.egress import access_log
from managed_agents.egress import request as requests
from managed_agents.egress.access_log import Outcome
from managed_agents.egress.connect import Unreachable
from managed_agents.egress.exchange import Books, ClientSide, Exchange, Refused, ServerSide
from managed_agents.egress.request import BadRequest, Target
from managed_agents.egress.substitution import Substitution
from managed_agents.egress.wire import Stream, Wire

HEAD_SECONDS_MAX = 30.0
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
REASONS = {
    400: "Bad Request",
    403: "Forbidden",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


Greet = Callable[[], Awaitable[None]]
"""Tells the client that its tunnel begins."""


class Visit(Books, Protocol):
    """What is known of one request while it lasts."""

    async def judge(self) -> bool:
        """Return whether TLS is to be ended here instead of passed on. Raises: Refused."""
        ...

    async def substitutions(self) -> Sequence[Substitution]:
        """What is written into the judged request. Raises: Refused."""
        ...

    async def open(self) -> Stream:
        """Connect to where the judged request goes. Raises: Unreachable."""
        ...

    async def tunnel(self, client: Wire, early: bytes, greet: Greet) -> None:
        """Connect, greet, and move bytes both ways; `early` has arrived already. Raises: Refused, Unreachable, OSError."""
        ...

    async def end_tls(self, client: Wire, early: bytes, greet: Greet) -> None:
        """Greet, be the server of the client's TLS, and serve what is inside. Raises: Refused, OSError."""
        ...

    def close(self, outcome: Outcome) -> None: ...


def refusal(status: int, message: str) -> bytes:
    """A complete answer after which the connection ends."""
    body = f"{message}\n".encode()
    # Of a refused CONNECT most programs show this line only.
    reason = message.rstrip(".") if status == 403 and message.isascii() else REASONS[status]
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


class HttpClient:
    """Serves one client connection."""

    def __init__(
        self, stream: Stream, visit: Callable[[access_log.Protocol, Target], Visit], *, inside: Target | None = None
    ) -> None:
        """`visit` opens the books on a request. `inside` is where a tunnel goes that was ended here."""
        self._stream, self._visit, self._inside = stream, visit, inside
        self._client = ClientSide(stream)
        self._kept: ServerSide | None = None

    async def serve(self, first: bytes = b"") -> None:
        """Serve until either side has enough. Raises: OSError, TimeoutError."""
        if first:
            self._client.connection.receive_data(first)
        try:
            while await self._one_request():
                self._client.connection.start_next_cycle()
        finally:
            self._close()

    async def _opened(self, visit: Visit) -> ServerSide:
        """A fresh connection to the server. Raises: Unreachable."""
        self._close()
        self._kept = ServerSide(await visit.open())
        return self._kept

    def _close(self) -> None:
        if self._kept is not None:
            self._kept.stream.close()
            self._kept = None

    async def _one_request(self) -> bool:
        """Returns whether another one may follow."""
        try:
            event = await self._client.event(HEAD_SECONDS_MAX)
        except h11.RemoteProtocolError as error:
            await self._answer(400, f"This is no HTTP request: {error}")
            return False
        if not isinstance(event, h11.Request):
            return False  # it went away
        try:
            protocol, target = self._target(event)
        except BadRequest as error:
            await self._answer(400, f"Bad request: {error}.")
            return False
        visit = self._visit(protocol, target)
        outcome: Outcome = "unreachable"
        try:
            ends_tls = await visit.judge()
            if protocol == "connect":
                outcome = "allowed"
                await self._connect(visit, ends_tls=ends_tls)
                return False
            substitutions = await visit.substitutions()
            server = self._kept if self._kept is not None and self._kept.again() else await self._opened(visit)
            outcome, keep = "allowed", self._inside is not None
            try:
                return await Exchange(self._client, server, visit, keep=keep).run(event, target, substitutions)
            finally:
                if not keep:
                    self._close()
        except (Refused, Unreachable) as error:
            outcome = error.outcome
            await self._answer(error.status, str(error))
            return False
        finally:
            visit.close(outcome)

    def _target(self, event: h11.Request) -> tuple[access_log.Protocol, Target]:
        """Raises: BadRequest."""
        headers = list(event.headers)
        if self._inside is not None:
            return "https", requests.inner_target(event.method, event.target, headers, self._inside)
        if event.method == b"CONNECT":
            return "connect", requests.tunnel_target(event.target, headers)
        return "http", requests.forward_target(event.target, headers)

    async def _connect(self, visit: Visit, *, ends_tls: bool) -> None:
        assert isinstance(self._stream, Wire), "CONNECT is refused inside TLS"
        early, _ = self._client.connection.trailing_data
        become = visit.end_tls if ends_tls else visit.tunnel
        await become(self._stream, early, self._greet)

    async def _greet(self) -> None:
        self._client.connection.send_failed()  # from here on the bytes are none of its business
        with anyio.fail_after(HEAD_SECONDS_MAX):
            await self._stream.send(ESTABLISHED)

    async def _answer(self, status: int, message: str) -> None:
        if self._client.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with anyio.fail_after(HEAD_SECONDS_MAX):
                await self._stream.send(refusal(status, message))
