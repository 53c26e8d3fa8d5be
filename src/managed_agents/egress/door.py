"""One sandbox's way out: the socket it comes to, and its connections."""

import logging
import socket

import anyio

from managed_agents.egress import socks
from managed_agents.egress.access_log import Outcome, Protocol
from managed_agents.egress.connect import Unreachable
from managed_agents.egress.exchange import Refused
from managed_agents.egress.http import HEAD_SECONDS_MAX, HttpClient, refusal
from managed_agents.egress.request import Target
from managed_agents.egress.visit import Sandbox, SandboxVisit, Shared
from managed_agents.egress.wire import Wire

ACCEPT_PAUSE_SECONDS = 0.1
FAIR_CONNECTIONS = 8  # of one sandbox, which it gets however many the others have
FULL = "The sandbox, or this host, has too many connections open."
logger = logging.getLogger(__name__)


class Door:
    """Serves one sandbox generation."""

    def __init__(self, shared: Shared, listener: socket.socket, sandbox_id: str, generation: int) -> None:
        self._sandbox = Sandbox(shared, sandbox_id, generation)
        self._listener = listener
        self._scope = anyio.CancelScope()
        self._connections = 0

    def close(self) -> None:
        """End everything; `serve` returns soon."""
        self._scope.cancel()

    async def serve(self) -> None:
        """Accept until closed."""
        with self._listener, self._scope:
            async with anyio.create_task_group() as group:
                while True:
                    try:
                        sock, _ = self._listener.accept()
                    except BlockingIOError:
                        await anyio.wait_readable(self._listener)
                        continue
                    except OSError as error:  # no descriptors left, most likely
                        logger.warning("cannot accept for %s: %s", self._sandbox.id, error)
                        await anyio.sleep(ACCEPT_PAUSE_SECONDS)
                        continue
                    group.start_soon(self._connection, sock)
                    await anyio.lowlevel.checkpoint()

    async def _connection(self, sock: socket.socket) -> None:
        """Supervise one connection: whatever it does, the others go on."""
        wire, shared = Wire(sock), self._sandbox.shared
        # Those who hold many connections do not keep the others from having some.
        crowded = shared.connections >= shared.connections_in_all_max and self._connections >= FAIR_CONNECTIONS
        full = crowded or self._connections >= shared.connections_max or shared.connections >= shared.connections_at_most
        self._connections += 1
        shared.connections += 1
        try:
            if full:
                with anyio.fail_after(1):
                    await wire.send(refusal(503, FULL))
            else:
                await self._speak(wire)
        except (OSError, EOFError):
            return  # either side went away or was silent for too long: the other notices
        except Exception:
            # Hostile input found something that was not thought of: it costs this connection and a line here.
            logger.exception("egress connection of %s.%d failed", self._sandbox.id, self._sandbox.generation)
        finally:
            self._connections -= 1
            shared.connections -= 1
            wire.close()

    async def _speak(self, wire: Wire) -> None:
        with anyio.fail_after(HEAD_SECONDS_MAX):
            first = await wire.receive(1)
        if first == bytes([socks.VERSION]):
            await self._socks(wire)
        elif first:
            await HttpClient(wire, self._visit).serve(first)

    def _visit(self, protocol: Protocol, target: Target) -> SandboxVisit:
        return SandboxVisit(self._sandbox, protocol, target)

    async def _socks(self, wire: Wire) -> None:
        try:
            with anyio.fail_after(HEAD_SECONDS_MAX):
                wanted = await socks.handshake(wire)
        except socks.SocksRefused as refused:
            if refused.reply is not None:
                await wire.send(socks.encoded(refused.reply))
            return
        visit = self._visit("socks", Target(wanted.host, wanted.port))
        outcome: Outcome = "unreachable"
        greeted = False

        async def greet() -> None:
            nonlocal greeted
            greeted = True
            with anyio.fail_after(HEAD_SECONDS_MAX):
                await wire.send(socks.encoded(socks.Reply.GRANTED))

        try:
            become = visit.end_tls if await visit.judge() else visit.tunnel
            outcome = "allowed"
            await become(wire, b"", greet)
        except (Refused, Unreachable) as error:
            outcome = error.outcome
            if not greeted:
                reply = socks.Reply.NOT_ALLOWED if error.status == 403 else socks.Reply.HOST_UNREACHABLE
                await wire.send(socks.encoded(reply))
        finally:
            visit.close(outcome)
