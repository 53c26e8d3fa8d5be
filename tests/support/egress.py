"""A gateway with one sandbox directory, its policy and resolver told by the test, and clients on its socket."""

import shutil
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.streams.tls

from managed_agents.core import addresses
from managed_agents.egress.access_log import Access, AccessLog
from managed_agents.egress.connect import Connector
from managed_agents.egress.gateway import Bounds, Gateway
from managed_agents.egress.policy import Policy, PolicyUnknown
from tests.support.waiting import until

KEY = "sbx_1.1"
WAIT_SECONDS = 15.0


@dataclass
class Way:
    """What the test says, and what it sees."""

    directory: Path
    policies: dict[tuple[str, int], Policy | None]
    names: dict[str, list[Sequence[str]]]
    """Answers of the resolver, in turn; the last one stays."""
    unknown: bool = False
    accesses: list[Access] = field(default_factory=list[Access])
    log: AccessLog = field(init=False)

    async def policy(self, sandbox_id: str, generation: int) -> Policy | None:
        if self.unknown:
            raise PolicyUnknown("away")
        return self.policies.get((sandbox_id, generation))

    async def write(self, entries: Sequence[Access]) -> None:
        self.accesses.extend(entries)

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
async def way_out(*, allowed: str = "127.0.0.0/8", bounds: Bounds | None = None) -> AsyncIterator[Way]:
    """Run a gateway whose only sandbox is unrestricted; loopback is allowed unless told otherwise."""
    directory = Path(tempfile.mkdtemp(prefix="ma-", dir="/tmp"))
    (directory / KEY / "egress").mkdir(parents=True)
    way = Way(directory, {("sbx_1", 1): Policy("sesn_1", "unrestricted")}, {})
    way.log = AccessLog(way)
    connector = Connector(addresses.networks(allowed), way.resolve)
    try:
        async with anyio.create_task_group() as group:
            await group.start(Gateway(directory, way, way.log, connector=connector, bounds=bounds).run)
            await until(way.socket_path.exists, seconds=WAIT_SECONDS)
            yield way
            group.cancel_scope.cancel()
    finally:
        shutil.rmtree(directory)


@dataclass
class Server:
    """A plain TCP server that answers as told and keeps what it got."""

    port: int
    answer: bytes
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
                made.requests.append(await stream.receive())
                await stream.send(made.answer)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return

    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield made
        group.cancel_scope.cancel()
