"""One sandbox's way out: its connections, what they may use, and what is written down about them."""

import logging
import socket
import time
from dataclasses import dataclass, field

import anyio

from managed_agents.egress import socks
from managed_agents.egress.access_log import Access, AccessLog, Outcome, Protocol, now
from managed_agents.egress.connect import Connector, Unreachable
from managed_agents.egress.http import HEAD_SECONDS_MAX, SILENCE_SECONDS_MAX, HttpClient, Refused, Visit, refusal
from managed_agents.egress.policy import EgressPolicy, PolicyUnknown
from managed_agents.egress.request import Target
from managed_agents.egress.wire import Wire, alone, splice

ACCEPT_PAUSE_SECONDS = 0.1
IDLE_LOOK_SECONDS = 30.0
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Shared:
    """What all doors of a gateway share."""

    policies: EgressPolicy
    log: AccessLog
    connector: Connector
    connections_max: int
    connections_in_all_max: int
    bytes_max: int
    connections: int = 0


class Door:
    """Serves one sandbox generation."""

    def __init__(self, shared: Shared, listener: socket.socket, sandbox_id: str, generation: int) -> None:
        self.shared = shared
        self.sandbox_id, self.generation = sandbox_id, generation
        self.bytes_used: int | None = None  # with what was used before this process; unknown until a policy was read
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
                        logger.warning("cannot accept for %s: %s", self.sandbox_id, error)
                        await anyio.sleep(ACCEPT_PAUSE_SECONDS)
                        continue
                    group.start_soon(self._connection, sock)
                    await anyio.lowlevel.checkpoint()

    async def _connection(self, sock: socket.socket) -> None:
        """Supervise one connection: whatever it does, the others go on."""
        wire, shared = Wire(sock), self.shared
        full = self._connections >= shared.connections_max or shared.connections >= shared.connections_in_all_max
        self._connections += 1
        shared.connections += 1
        try:
            if full:
                with anyio.fail_after(1):
                    await wire.send(refusal(503, "The sandbox has too many connections open."))
            else:
                await self._speak(wire)
        except (OSError, EOFError):
            return  # either side went away or was silent for too long: the other notices
        except Exception:
            # Hostile input found something that was not thought of: it costs this connection and a line here.
            logger.exception("egress connection of %s.%d failed", self.sandbox_id, self.generation)
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
            await HttpClient(wire, self._visit, self.tunnel).serve(first)

    def _visit(self, is_tunnel: bool, target: Target) -> "DoorVisit":
        return DoorVisit(self, "connect" if is_tunnel else "http", target)

    async def _socks(self, wire: Wire) -> None:
        try:
            with anyio.fail_after(HEAD_SECONDS_MAX):
                wanted = await socks.handshake(wire)
        except socks.SocksRefused as refused:
            if refused.reply is not None:
                await wire.send(socks.encoded(refused.reply))
            return
        target = Target(wanted.host, wanted.port)
        visit = DoorVisit(self, "socks", target)
        outcome: Outcome = "unreachable"
        try:
            upstream = await visit.open(target)
            try:
                outcome = "allowed"
                await wire.send(socks.encoded(socks.Reply.GRANTED))
                await self.tunnel(wire, upstream, visit)
            finally:
                upstream.close()
        except (Refused, Unreachable) as error:
            reply = socks.Reply.NOT_ALLOWED if error.status == 403 else socks.Reply.HOST_UNREACHABLE
            if outcome != "allowed":
                await wire.send(socks.encoded(reply))
            outcome = error.outcome
        finally:
            visit.close(outcome)

    async def tunnel(self, client: Wire, upstream: Wire, visit: Visit) -> None:
        """Move bytes both ways, unseen, until both sides ended, one broke, or nothing moved for long.

        Raises: Refused when the budget is spent, OSError.
        """
        moved_at = time.monotonic()

        def sent(size: int) -> None:
            nonlocal moved_at
            moved_at = time.monotonic()
            visit.sent(size)

        def received(size: int) -> None:
            nonlocal moved_at
            moved_at = time.monotonic()
            visit.received(size)

        async def both(scope: anyio.CancelScope) -> None:
            async with anyio.create_task_group() as pumps:
                pumps.start_soon(splice, client, upstream, sent)
                pumps.start_soon(splice, upstream, client, received)
            scope.cancel()

        with alone():
            async with anyio.create_task_group() as group:
                group.start_soon(both, group.cancel_scope)
                while time.monotonic() - moved_at < SILENCE_SECONDS_MAX:
                    await anyio.sleep(IDLE_LOOK_SECONDS)
                group.cancel_scope.cancel()


@dataclass(slots=True)
class DoorVisit:
    """The books on one request."""

    door: Door
    protocol: Protocol
    target: Target
    bytes_sent: int = 0
    bytes_received: int = 0
    session_id: str | None = None
    began: float = field(default_factory=time.monotonic)

    async def open(self, target: Target) -> Wire:
        door = self.door
        try:
            policy = await door.shared.policies.policy(door.sandbox_id, door.generation)
        except PolicyUnknown as error:
            message = "The egress gateway cannot read what this sandbox may reach. Please retry."
            raise Refused(message, "unreachable", status=503) from error
        if policy is None:
            raise Refused("This sandbox has no session.", "blocked")
        self.session_id = policy.session_id
        if door.bytes_used is None:
            door.bytes_used = policy.bytes_before
        if door.bytes_used >= door.shared.bytes_max:
            raise Refused("The session's network traffic is used up.", "over_limit")
        if not policy.allows(target.host):
            raise Refused(f"{target.host} is not among the hosts that this environment's networking allows.", "blocked")
        return await door.shared.connector.connect(target.host, target.port)

    def sent(self, size: int) -> None:
        self.bytes_sent += size
        self._spend(size)

    def received(self, size: int) -> None:
        self.bytes_received += size
        self._spend(size)

    def _spend(self, size: int) -> None:
        door = self.door
        door.bytes_used = (door.bytes_used or 0) + size
        if door.bytes_used > door.shared.bytes_max:
            raise Refused("The session's network traffic is used up.", "over_limit")

    def close(self, outcome: Outcome) -> None:
        if self.session_id is None:
            return  # nobody's
        self.door.shared.log.add(
            Access(
                session_id=self.session_id,
                sandbox_id=self.door.sandbox_id,
                generation=self.door.generation,
                at=now(),
                protocol=self.protocol,
                host=self.target.host,
                port=self.target.port,
                outcome=outcome,
                bytes_sent=self.bytes_sent,
                bytes_received=self.bytes_received,
                seconds=time.monotonic() - self.began,
            )
        )
