"""A stream socket without a buffer of its own: what the peer does not take is not read from the other side.

Every wait is bounded by the caller's deadline; each turn of a loop is a checkpoint, so that no connection keeps the others from
the event loop.
"""

import os
import socket
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Protocol, cast

import anyio
import anyio.lowlevel

RECEIVE_BYTES = 64 * 1024
SPLICE_BYTES = 1024 * 1024
IDLE_LOOK_SECONDS = 30.0

Spend = Callable[[int], None]
"""Takes a number of bytes off a budget. Raises when there is nothing left."""


Pump = Callable[[Spend], Awaitable[None]]
"""Moves bytes one way, and says how many."""


class Stream(Protocol):
    """A connection to one side, in the clear or inside TLS (`tls.py`)."""

    async def receive(self, size: int = RECEIVE_BYTES) -> bytes:
        """Return what has arrived; nothing at the end. Raises: OSError."""
        ...

    async def send(self, data: bytes) -> None:
        """Raises: OSError."""
        ...

    async def gone(self) -> bool:
        """Wait until the peer says more or ends; return whether it ended. Raises: OSError."""
        ...

    @property
    def quiet(self) -> bool:
        """Whether the connection is whole and nothing has arrived on it that was not received."""
        ...

    def close(self) -> None: ...


class Wire:
    """Owns a connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock

    async def receive(self, size: int = RECEIVE_BYTES) -> bytes:
        """Return what has arrived; nothing at the end. Raises: OSError."""
        while True:
            await anyio.lowlevel.checkpoint()
            try:
                return self.socket.recv(size)
            except BlockingIOError:
                await anyio.wait_readable(self.socket)

    async def receive_exactly(self, size: int) -> bytes:
        """Raises: OSError, EOFError."""
        received = b""
        while len(received) < size:
            part = await self.receive(size - len(received))
            if not part:
                raise EOFError
            received += part
        return received

    async def send(self, data: bytes) -> None:
        """Raises: OSError."""
        rest = memoryview(data)
        while rest:
            await anyio.lowlevel.checkpoint()
            try:
                rest = rest[self.socket.send(rest) :]
            except BlockingIOError:
                await anyio.wait_writable(self.socket)

    async def gone(self) -> bool:
        """As `Stream.gone`."""
        await anyio.wait_readable(self.socket)
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    @property
    def quiet(self) -> bool:
        """As `Stream.quiet`."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def end(self) -> None:
        """Say that nothing more is sent."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the peer is gone: whoever reads from it notices

    def close(self) -> None:
        self.socket.close()


async def splice(source: Wire, sink: Wire, spend: Spend) -> None:
    """Move bytes from one socket to the other until the end, inside the kernel: they are never in this process's memory.

    Raises: OSError, and what `spend` raises.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    flags = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
    try:
        while True:
            await anyio.lowlevel.checkpoint()
            try:
                moved = os.splice(source.socket.fileno(), write_end, SPLICE_BYTES, flags=flags)
            except BlockingIOError:
                await anyio.wait_readable(source.socket)
                continue
            if moved == 0:
                return sink.end()
            spend(moved)
            while moved:
                try:
                    moved -= os.splice(read_end, sink.socket.fileno(), moved, flags=flags)
                except BlockingIOError:
                    await anyio.wait_writable(sink.socket)
    finally:
        os.close(read_end)
        os.close(write_end)


async def relay(source: Stream, sink: Stream, spend: Spend) -> None:
    """Move bytes from one connection to the other until the end, where `splice` cannot.

    Raises: OSError, and what `spend` raises.
    """
    while data := await source.receive():
        spend(len(data))
        await sink.send(data)


async def both_ways(up: Pump, down: Pump, sent: Spend, received: Spend, *, half_open: bool, silence_seconds: float) -> None:
    """Run two pumps until both have ended (or one, unless `half_open`), one failed, or nothing moved for long.

    Raises: what they raise.
    """
    moved_at = time.monotonic()

    def counted(spend: Spend) -> Spend:
        def moved(size: int) -> None:
            nonlocal moved_at
            moved_at = time.monotonic()
            spend(size)

        return moved

    async def one(pump: Pump, spend: Spend, scope: anyio.CancelScope) -> None:
        await pump(counted(spend))
        if not half_open:
            scope.cancel()

    async def both(scope: anyio.CancelScope) -> None:
        async with anyio.create_task_group() as pumps:
            pumps.start_soon(one, up, sent, pumps.cancel_scope)
            pumps.start_soon(one, down, received, pumps.cancel_scope)
        scope.cancel()

    with alone():
        async with anyio.create_task_group() as group:
            group.start_soon(both, group.cancel_scope)
            while time.monotonic() - moved_at < silence_seconds:
                await anyio.sleep(IDLE_LOOK_SECONDS)
            group.cancel_scope.cancel()


@contextmanager
def alone() -> Generator[None]:
    """Raise one failure of a task group instead of the group: the first that is more than a broken connection, if any."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise min(_leaves(group), key=lambda error: isinstance(error, OSError)) from None


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(cast("BaseExceptionGroup[BaseException]", error)) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
