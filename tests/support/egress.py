"""A gateway with one sandbox directory, its policy and resolver told by the test, and clients on its socket."""

import dataclasses
import shutil
import socket
import ssl
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.streams.tls

from managed_agents.core import addresses
from managed_agents.egress import authority, tls
from managed_agents.egress.access_log import Access, AccessLog
from managed_agents.egress.authority import Authority
from managed_agents.egress.connect import Connector
from managed_agents.egress.gateway import Bounds, Gateway
from managed_agents.egress.policy import Binding, Policy, PolicyUnknown
from managed_agents.egress.substitution import SecretUnknown, Sources, Substitution
from managed_agents.egress.visit import Credentials
from tests.support.waiting import until

KEY = "sbx_1.1"
WAIT_SECONDS = 15.0


@dataclass
class Lender:
    """A `Source` whose bindings and secrets the test says."""

    bound: list[Binding] = field(default_factory=list[Binding])
    secrets: dict[str, Substitution | None] = field(default_factory=dict[str, Substitution | None])
    asked: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    async def bindings(self, session_id: str) -> Sequence[Binding]:
        return self.bound

    async def substitution(self, session_id: str, binding: Binding) -> Substitution | None:
        self.asked.append((session_id, binding.id))
        if binding.id not in self.secrets:
            raise SecretUnknown("The credential for this host cannot be read. Please retry.")
        return self.secrets[binding.id]

    def lend(self, host: str, port: int, substitution: Substitution | None, **more: Any) -> None:
        """Bind a secret to a host."""
        key = f"secret_{len(self.bound)}"
        self.bound.append(Binding("lender", key, (host,), port=port, **more))
        self.secrets[key] = substitution


@dataclass
class Way:
    """What the test says, and what it sees."""

    directory: Path
    policies: dict[tuple[str, int], Policy | None]
    names: dict[str, list[Sequence[str]]]
    """Answers of the resolver, in turn; the last one stays."""
    unknown: bool = False
    accesses: list[Access] = field(default_factory=list[Access])
    traffic: Counter[str] = field(default_factory=Counter[str])
    lender: Lender = field(default_factory=Lender)
    log: AccessLog = field(init=False)
    authority: Authority = field(init=False)
    """Whose certificates sandboxes trust."""
    world: Authority = field(init=False)
    """Whose certificates the gateway trusts."""

    async def policy(self, sandbox_id: str, generation: int) -> Policy | None:
        if self.unknown:
            raise PolicyUnknown("away")
        found = self.policies.get((sandbox_id, generation))
        return found and dataclasses.replace(found, bindings=tuple(self.lender.bound))

    async def write(self, entries: Sequence[Access], traffic: Mapping[str, int]) -> None:
        self.accesses.extend(entries)
        self.traffic.update(traffic)

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        if host not in self.names:
            found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return [str(entry[4][0]) for entry in found]
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def allow(self, *hosts: str) -> None:
        self.policies["sbx_1", 1] = Policy("sesn_1", "limited", hosts)

    @property
    def socket_path(self) -> Path:
        return self.directory / KEY / "egress" / "egress.sock"

    async def connect(self) -> anyio.abc.SocketStream:
        with anyio.fail_after(WAIT_SECONDS):
            return await anyio.connect_unix(self.socket_path)

    async def ask(self, data: bytes) -> bytes:
        """Send bytes and return everything that comes back until the end."""
        stream = await self.connect()
        async with stream:
            with anyio.fail_after(WAIT_SECONDS):
                with suppress(anyio.BrokenResourceError):  # refused while it was sent: why is in the answer
                    await stream.send(data)
                return await read_all(stream)

    @asynccontextmanager
    async def inside(self, authority: str, *, name: str | None = None) -> AsyncIterator[anyio.streams.tls.TLSStream]:
        """A TLS connection through a tunnel, as a sandbox that trusts the gateway's authority makes it."""
        async with await self.connect() as stream:
            with anyio.fail_after(WAIT_SECONDS):
                await stream.send(f"CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n".encode())
                answer = await stream.receive()
                assert answer.startswith(b"HTTP/1.1 200"), answer
                context = ssl.create_default_context(cadata=self.authority.pem)
                host = name or authority.rpartition(":")[0].strip("[]")
                wrapped = await anyio.streams.tls.TLSStream.wrap(stream, hostname=host, ssl_context=context)
            yield wrapped

    async def ask_inside(self, authority: str, data: bytes) -> bytes:
        """As `ask`, inside TLS."""
        async with self.inside(authority) as stream:
            with anyio.fail_after(WAIT_SECONDS):
                await stream.send(data)
                return await read_all(stream)

    async def logged(self, count: int) -> list[Access]:
        """The first `count` entries; they come when a connection has ended on both sides."""

        async def enough() -> bool:
            await self.log.flush()
            return len(self.accesses) >= count

        await until(enough, seconds=WAIT_SECONDS)
        return self.accesses


async def read_all(stream: anyio.abc.ByteReceiveStream) -> bytes:
    received = b""
    while True:
        try:
            received += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return received


@asynccontextmanager
async def way_out(
    *, allowed: str = "127.0.0.0/8", bounds: Bounds | None = None, directory: Path | None = None
) -> AsyncIterator[Way]:
    """Run a gateway whose only sandbox is unrestricted; loopback is allowed unless told otherwise."""
    directory = directory or Path(tempfile.mkdtemp(prefix="ma-", dir="/tmp"))
    (directory / KEY / "egress").mkdir(parents=True, exist_ok=True)
    way = Way(directory, {("sbx_1", 1): Policy("sesn_1", "unrestricted")}, {})
    way.log = AccessLog(way)
    way.authority, way.world = authority.load(directory / ".ours"), authority.load(directory / ".world")
    trusted = tls.trusted_context(way.world.pem)
    credentials = Credentials(Sources({"lender": way.lender}), lambda: way.authority, lambda: trusted)
    connector = Connector(addresses.networks(allowed), way.resolve)
    try:
        async with anyio.create_task_group() as group:
            gateway = Gateway(directory, way, way.log, connector=connector, credentials=credentials, bounds=bounds)
            await group.start(gateway.run)
            await until(way.socket_path.exists, seconds=WAIT_SECONDS)
            yield way
            group.cancel_scope.cancel()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Server:
    """A plain TCP server that answers as told and keeps what it got."""

    port: int
    answer: bytes
    ending: bytes = b""
    """What a request ends with that comes in several pieces."""
    requests: list[bytes] = field(default_factory=list[bytes])
    connections: int = 0

    @property
    def authority(self) -> str:
        return f"site.test:{self.port}"


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


@asynccontextmanager
async def server(answer: bytes = OK, *, tls: ssl.SSLContext | None = None, echo: bool = False) -> AsyncIterator[Server]:
    """Serve on loopback: reads what comes in one piece (or echoes until the end), answers, closes."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    made = Server(port, answer)

    async def serve(stream: Any) -> None:
        made.connections += 1
        async with stream:
            try:
                if tls is not None:
                    stream = await anyio.streams.tls.TLSStream.wrap(stream, ssl_context=tls, standard_compatible=False)
                if echo:
                    while True:
                        await stream.send(await stream.receive())
                received = await stream.receive()
                while not received.endswith(made.ending):
                    received += await stream.receive()
                made.requests.append(received)
                await stream.send(made.answer)
            except (anyio.EndOfStream, anyio.BrokenResourceError, ssl.SSLError):
                return

    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield made
        group.cancel_scope.cancel()
