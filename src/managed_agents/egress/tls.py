"""TLS over a wire, on either side, with no more of it in memory than what is being moved.

One task may receive while another sends. Whoever is cancelled while bytes leave has broken the connection, and every later use of
it says so.
"""

import contextlib
import ssl

import anyio
import anyio.lowlevel

from managed_agents.egress.connect import Connector, Unreachable
from managed_agents.egress.request import Target
from managed_agents.egress.wire import RECEIVE_BYTES, Wire

AUTHORITY_DIRECTORY = "egress-authority"  # in the data directory
AUTHORITY_CERTIFICATE = "certificate.pem"
HANDSHAKE_SECONDS_MAX = 15.0
SEND_BYTES = 64 * 1024


class TlsFailed(Exception):
    """No TLS connection came about; the message says why."""


class AuthorityUnreadable(Exception):
    """This host's authority can be neither read nor made."""


class TlsStream:
    """A `Stream` inside TLS. Owns the wire."""

    def __init__(
        self, wire: Wire, context: ssl.SSLContext, *, server_side: bool, server_name: str | None = None, early: bytes = b""
    ) -> None:
        """`early` has arrived on the wire already."""
        self._wire = wire
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name)
        self._sending = anyio.Lock()
        self._broken = False
        self._held = b""  # arrived while nobody asked for it
        if early:
            self._incoming.write(early)

    async def handshake(self) -> None:
        """Raises: TlsFailed, OSError, TimeoutError."""
        with anyio.fail_after(HANDSHAKE_SECONDS_MAX):
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    await self._flush()
                    await self._fill()
                except ssl.SSLCertVerificationError as error:
                    await self._flush()
                    raise TlsFailed(error.verify_message) from error
                except ssl.SSLError as error:
                    await self._flush()  # the alert that tells the peer
                    raise TlsFailed((error.reason or type(error).__name__).lower().replace("_", " ")) from error
                else:
                    return await self._flush()

    async def receive(self, size: int = RECEIVE_BYTES) -> bytes:
        """As `Stream.receive`."""
        if self._held:
            held, self._held = self._held[:size], self._held[size:]
            return held
        while True:
            await anyio.lowlevel.checkpoint()
            received: list[bytes] = []
            room = size
            try:
                while room > 0:
                    part = self._tls.read(room)
                    if not part:
                        break
                    received.append(part)
                    room -= len(part)
                return b"".join(received)
            except ssl.SSLError as error:
                if received:
                    return b"".join(received)  # what is wrong is met again by the next call
                if not isinstance(error, ssl.SSLWantReadError):
                    raise
            await self._flush()
            await self._fill()

    async def send(self, data: bytes) -> None:
        """As `Stream.send`."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest[:SEND_BYTES]) :]
            await self._flush()

    async def gone(self) -> bool:
        """As `Stream.gone`. What was said meanwhile is kept, up to one piece."""
        if not self._held:
            self._held = await self.receive()
        return not self._held

    @property
    def quiet(self) -> bool:
        """As `Stream.quiet`."""
        idle = not self._held and not self._incoming.pending and not self._tls.pending()
        return idle and not self._broken and self._wire.quiet

    def close(self) -> None:
        with contextlib.suppress(OSError):
            # Says that it ends; does not wait for the peer to say so too.
            if not self._broken:
                with contextlib.suppress(ssl.SSLWantReadError):
                    self._tls.unwrap()
                self._wire.socket.send(self._outgoing.read())
        self._wire.close()

    async def _fill(self) -> None:
        received = await self._wire.receive()
        if received:
            self._incoming.write(received)
        else:
            self._incoming.write_eof()

    async def _flush(self) -> None:
        if not self._outgoing.pending:
            return
        async with self._sending:
            if self._broken:
                raise ConnectionAbortedError("the connection was broken off while sending")
            self._broken = True
            await self._wire.send(self._outgoing.read())
            self._broken = False


async def connect(connector: Connector, trusted: ssl.SSLContext, target: Target) -> TlsStream:
    """Connect to a host and see that it is the one. Raises: Unreachable."""
    stream = TlsStream(await connector.connect(target.host, target.port), trusted, server_side=False, server_name=target.host)
    try:
        await stream.handshake()
    except BaseException as error:
        stream.close()
        if isinstance(error, TlsFailed):
            raise Unreachable(f"{target.authority} has no valid TLS: {error}", "unreachable") from error
        if isinstance(error, TimeoutError):
            raise Unreachable(f"{target.authority} does not answer", "unreachable", status=504) from error
        if isinstance(error, OSError):
            message = f"{target.authority} broke off the TLS handshake"
            raise Unreachable(message, "unreachable") from error
        raise
    return stream


def trusted_context(authorities: str) -> ssl.SSLContext:
    """What servers are verified with: `authorities` in PEM, and nothing else.

    Raises: ValueError, ssl.SSLError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_verify_locations(cadata=authorities)
    return context
