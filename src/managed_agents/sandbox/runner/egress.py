"""The way out, inside: a loopback port whose connections end in the host's egress gateway.

The runner holds the listening socket, so that no command can take the port, and starts the forwarder, a process of the commands'
uid, when somebody comes. The forwarder ends when nobody came for a while. It judges nothing: whoever attacks it gains what any
command has anyway, the gateway's socket.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import suppress

from .children import top_directory
from .config import Config

IDLE_SECONDS = 60.0
CONNECTIONS_MAX = 512
BUFFER_BYTES = 256 * 1024
RETRY_SECONDS = 0.05
RETRIES_SECONDS_MAX = 10.0
RESTART_SECONDS_MIN = 0.1
RESTART_SECONDS_MAX = 5.0
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from {0} import egress; egress.main(int(sys.argv[2]), sys.argv[3])"
_ABSENT = b"The egress gateway of this host does not answer. Please retry.\n"
ABSENT = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nconnection: close\r\n"
    + b"content-length: %d\r\n\r\n" % len(_ABSENT)
    + _ABSENT
)


# The runner's side


class Forwarder:
    """Keeps the port, and a process behind it while it is used."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Until cancelled. Without a socket of a gateway in the configuration there is nothing to do."""
        if self._config.egress_socket is None or self._config.proxy_port is None:
            return
        with socket.create_server(("127.0.0.1", self._config.proxy_port), backlog=128) as listener:
            listener.setblocking(False)
            pause = RESTART_SECONDS_MIN
            while True:
                await _readable(listener)
                began = asyncio.get_running_loop().time()
                with suppress(OSError):  # no process to be had, now
                    await self._serve(listener)
                lived = asyncio.get_running_loop().time() - began
                pause = RESTART_SECONDS_MIN if lived > RESTART_SECONDS_MAX else min(2 * pause, RESTART_SECONDS_MAX)
                await asyncio.sleep(pause)

    async def _serve(self, listener: socket.socket) -> None:
        """Run the process until it ends."""
        uid = self._config.uid
        package = __name__.rpartition(".")[0]
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-B", "-c", _BOOT.format(package), top_directory(package)),
            *(str(listener.fileno()), str(self._config.egress_socket)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env={},
            cwd="/",
            start_new_session=True,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )
        try:
            await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_reader(sock, came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(sock)


# The forwarder's side


class _End(asyncio.BufferedProtocol):
    """One end of a connection: what arrives is written to the other, which is read no faster than this one takes it."""

    def __init__(self) -> None:
        self._buffer = bytearray(BUFFER_BYTES)
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None
        self.ended = False
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=BUFFER_BYTES)

    def get_buffer(self, sizehint: int) -> bytearray:
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(bytes(memoryview(self._buffer)[:nbytes]))

    def eof_received(self) -> bool:
        self.ended = True
        if self.other is not None and self.other.ended:
            # Nobody says anything more. Neither transport would close by itself, and both sockets would stay for ever.
            if self.other.transport is not None:
                self.other.transport.close()  # what is buffered is still sent
            return False
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            with suppress(OSError):
                self.other.transport.write_eof()
        return True  # the other direction may go on

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if not self.closed.done():
            self.closed.set_result(None)


async def _to_gateway(path: str) -> socket.socket | None:
    """Connect to the gateway; it may be starting again."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + RETRIES_SECONDS_MAX
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, path)
        except OSError:
            sock.close()
            if loop.time() > deadline:
                return None
            await asyncio.sleep(RETRY_SECONDS)
        except BaseException:
            sock.close()
            raise
        else:
            return sock


async def _forward(client: socket.socket, path: str) -> None:
    loop = asyncio.get_running_loop()
    gateway = await _to_gateway(path)
    if gateway is None:
        with client, suppress(OSError):
            await loop.sock_sendall(client, ABSENT)
        return
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    inner, outer = _End(), _End()
    inner.other, outer.other = outer, inner
    transports: list[asyncio.BaseTransport] = []
    try:
        # The gateway's end first: it never speaks before the client, whose bytes may be here already.
        for sock, end in ((gateway, outer), (client, inner)):
            made, _ = await loop.connect_accepted_socket(lambda end=end: end, sock)
            transports.append(made)
        await asyncio.wait([inner.closed, outer.closed], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for transport in transports:
            transport.close()  # what is buffered is still sent


async def _serve(listener: socket.socket, path: str) -> None:
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    under_way: set[asyncio.Future[None]] = set()
    while True:
        accepting = asyncio.ensure_future(loop.sock_accept(listener))
        # With too many at once the next ones wait in the backlog.
        await asyncio.wait([accepting], timeout=IDLE_SECONDS)
        if not accepting.done():
            accepting.cancel()
            if not under_way:
                return
            continue
        client, _ = accepting.result()
        task = asyncio.ensure_future(_forward(client, path))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        while len(under_way) >= CONNECTIONS_MAX:
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)


def main(listener_fd: int, path: str) -> None:
    """Entry of the forwarder; `listener_fd` is the listening socket, `path` the gateway's."""
    os.umask(0o022)
    if sys.platform == "linux":
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    asyncio.run(_serve(socket.socket(fileno=listener_fd), path))
