"""One request and its answer, between a client and a server, both framed by h11.

Everything is written anew from what was understood of it. Bodies pass in pieces, in both directions at once; what a credential
replaces in a body is replaced on the way, and only small bodies are held back for it, so that their length can be told.

Race: a server may answer before it has the whole request, and close. Its answer still arrives.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import anyio
import h11

from managed_agents.egress import request as requests
from managed_agents.egress.access_log import Outcome
from managed_agents.egress.connect import Unreachable
from managed_agents.egress.request import Target
from managed_agents.egress.substitution import Replacing, SecretUnknown, Substitution, in_body, written
from managed_agents.egress.wire import RECEIVE_BYTES, Stream, alone, both_ways, relay

HEAD_BYTES_MAX = 64 * 1024
HEAD_PIECE_BYTES = 8 * 1024
SILENCE_SECONDS_MAX = 900.0  # an answer may take long to begin; a connection without a byte in either direction ends
HELD_BODY_BYTES_MAX = 64 * 1024  # of a body that is rewritten; longer ones are sent in chunks


class Refused(Exception):
    """The gateway does not let this through; the message is for the sandbox."""

    def __init__(self, message: str, outcome: Outcome, *, status: int = 403) -> None:
        super().__init__(message)
        self.outcome: Outcome = outcome
        self.status = status


class Books(Protocol):
    """What is written down about one request: all bytes of it between the gateway and the server, heads included."""

    def sent(self, size: int) -> None:
        """Raises: Refused when the budget is spent."""
        ...

    def received(self, size: int) -> None:
        """Raises: Refused when the budget is spent."""
        ...


class ClientSide:
    """What the client says, and what is said to it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def event(self, seconds: float) -> h11.Event | None:
        """The next thing the client says; None when it may not say any more yet.

        Raises: OSError, TimeoutError, h11.RemoteProtocolError.
        """
        with anyio.fail_after(seconds):
            while True:
                event = self.connection.next_event()
                if event is not h11.NEED_DATA:
                    return event if isinstance(event, h11.Event) else None
                # h11 looks at its bound between pieces: a head arrives in small ones.
                size = HEAD_PIECE_BYTES if self.connection.their_state is h11.IDLE else RECEIVE_BYTES
                self.connection.receive_data(await self.stream.receive(size))

    async def send(self, event: h11.Event) -> None:
        """Raises: OSError, TimeoutError."""
        with anyio.fail_after(SILENCE_SECONDS_MAX):
            await self.stream.send(self.connection.send(event) or b"")


class ServerSide:
    """A connection to a server, for one request, or for those of one client connection in turn."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
        self.used = False

    def again(self) -> bool:
        """Make ready for another request. Returns whether that can be."""
        states = (self.connection.our_state, self.connection.their_state)
        if states != (h11.DONE, h11.DONE) or self.connection.trailing_data[0]:
            return False
        self.connection.start_next_cycle()
        self.used = True
        return self.stream.quiet


class Exchange:
    """Passes one request on, and its answer back."""

    def __init__(self, client: ClientSide, server: ServerSide, books: Books, *, keep: bool) -> None:
        """`keep`: the server's connection may serve another request, or go on with another protocol."""
        self._client, self._books, self._keep = client, books, keep
        self._link, self._upstream, self._server = server, server.stream, server.connection
        self._upgrade: bytes | None = None

    async def run(self, request: h11.Request, target: Target, substitutions: Sequence[Substitution] = ()) -> bool:
        """Returns whether another request may follow. Raises: Refused, Unreachable, OSError, TimeoutError."""
        headers = requests.forwarded(list(request.headers), also_without=[b"host", b"expect"])
        self._upgrade = requests.upgrade(list(request.headers)) if self._keep else None
        try:
            headers = written(substitutions, headers)
        except SecretUnknown as error:
            raise Refused(str(error), "unreachable", status=503) from error
        replaced = in_body(substitutions)
        replacing = Replacing(replaced) if replaced else None
        switched = False
        with alone():
            async with anyio.create_task_group() as group:
                group.start_soon(self._upload, request, target, headers, replacing)
                switched = await self._download()
                group.cancel_scope.cancel()
        if switched:
            await self._go_on()
        connection = self._client.connection
        return (connection.our_state, connection.their_state) == (h11.DONE, h11.DONE)

    async def _go_on(self) -> None:
        """Move the bytes of the other protocol, as they are."""
        for connection, stream, spend in (
            (self._client.connection, self._upstream, self._books.sent),
            (self._server, self._client.stream, self._books.received),
        ):
            if early := connection.trailing_data[0]:
                if connection is self._client.connection:
                    spend(len(early))  # what the server said early was counted when it arrived
                with anyio.fail_after(SILENCE_SECONDS_MAX):
                    await stream.send(early)
        up = functools.partial(relay, self._client.stream, self._upstream)
        down = functools.partial(relay, self._upstream, self._client.stream)
        sent, received = self._books.sent, self._books.received
        await both_ways(up, down, sent, received, half_open=False, silence_seconds=SILENCE_SECONDS_MAX)

    # The request

    async def _upload(
        self, request: h11.Request, target: Target, headers: list[tuple[bytes, bytes]], replacing: Replacing | None
    ) -> None:
        try:
            if self._client.connection.they_are_waiting_for_100_continue:
                await self._client.send(h11.InformationalResponse(status_code=100, headers=[]))
            held: bytes | None = None
            if replacing is not None:
                headers, held = await self._held_body(headers, replacing)
            head = [(b"host", target.authority.encode()), *headers]
            if self._upgrade is not None:
                head += [(b"connection", b"upgrade"), (b"upgrade", self._upgrade)]
            elif not self._keep:
                head.append((b"connection", b"close"))
            going = await self._pass(h11.Request(method=request.method, target=target.path, headers=head))
            if held is not None:
                going = going and await self._pass(h11.Data(data=held)) and await self._pass(h11.EndOfMessage())
            elif going:
                going = await self._body(replacing)
        except (h11.RemoteProtocolError, h11.LocalProtocolError) as error:
            raise ConnectionAbortedError(f"the request's body is broken: {error}") from error
        # Else a silent server would hold the connection of a client that does not wait for its answer.
        if going and await self._client.stream.gone():
            raise ConnectionAbortedError("the client went away")

    async def _body(self, replacing: Replacing | None) -> bool:
        """Pass the body on. Returns whether the server took it."""
        while True:
            event = await self._client.event(SILENCE_SECONDS_MAX)
            if isinstance(event, h11.Data):
                data = replacing.feed(bytes(event.data)) if replacing is not None else event.data
                if not await self._pass(h11.Data(data=data)):
                    return False
            elif isinstance(event, h11.EndOfMessage):
                if replacing is not None and not await self._pass(h11.Data(data=replacing.end())):
                    return False
                return await self._pass(h11.EndOfMessage())
            else:
                return False

    async def _held_body(
        self, headers: list[tuple[bytes, bytes]], replacing: Replacing
    ) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        """Return headers that fit the rewritten body, and that body when it is small enough to be kept.

        Else it is to be sent in chunks as it is rewritten: nobody knows its length beforehand.
        """
        length = next((int(value) for name, value in headers if name == b"content-length"), None)
        others = [(name, value) for name, value in headers if name not in (b"content-length", b"transfer-encoding")]
        if length is None:
            return headers, None
        if length > HELD_BODY_BYTES_MAX:
            return [*others, (b"transfer-encoding", b"chunked")], None
        body = b""
        while isinstance(event := await self._client.event(SILENCE_SECONDS_MAX), h11.Data):
            body += replacing.feed(bytes(event.data))
        if not isinstance(event, h11.EndOfMessage):
            raise ConnectionAbortedError("the client went away")
        body += replacing.end()
        return [*others, (b"content-length", str(len(body)).encode())], body

    async def _pass(self, event: h11.Event) -> bool:
        """Say something to the server. Returns whether it listens: it may have answered and closed."""
        data = self._server.send(event) or b""
        self._books.sent(len(data))
        try:
            with anyio.fail_after(SILENCE_SECONDS_MAX):
                await self._upstream.send(data)
        except TimeoutError:
            raise
        except OSError:
            return False
        return True

    # The answer

    async def _download(self) -> bool:
        """Returns whether both sides go on with another protocol."""
        begun = False
        while True:
            try:
                event = self._server.next_event()
                if event is h11.NEED_DATA:
                    with anyio.fail_after(SILENCE_SECONDS_MAX):
                        data = await self._upstream.receive()
                    self._books.received(len(data))
                    self._server.receive_data(data)
                    continue
            except (h11.RemoteProtocolError, OSError) as error:
                if begun or self._link.used:
                    # A connection that was used before may have been closed meanwhile: clients know that of theirs.
                    raise ConnectionAbortedError("the answer broke off") from error
                raise Unreachable(f"The server's answer is none: {error}", "unreachable") from error
            if isinstance(event, h11.Response):
                begun = True
                headers = requests.forwarded(list(event.headers))
                await self._client.send(h11.Response(status_code=event.status_code, headers=headers, reason=event.reason))
            elif isinstance(event, h11.Data):
                await self._client.send(event)
            elif isinstance(event, h11.EndOfMessage):
                await self._client.send(h11.EndOfMessage())
                return False
            elif isinstance(event, h11.InformationalResponse):
                if event.status_code == 101 and self._upgrade is not None:
                    headers = [*requests.forwarded(list(event.headers)), (b"connection", b"upgrade"), (b"upgrade", self._upgrade)]
                    await self._client.send(h11.InformationalResponse(status_code=101, headers=headers, reason=event.reason))
                    return True
            elif self._link.used:
                raise ConnectionAbortedError("the server closed its connection")
            else:
                raise Unreachable("The server closed the connection without an answer", "unreachable")
