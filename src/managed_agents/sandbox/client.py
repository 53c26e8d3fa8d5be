"""Connections to a runner.

The protocol multiplexes, but a unix socket connection costs less than the task that would read for many
streams: here an exchange leases a connection for itself, and returns it when it ended cleanly. So no task
outlives its caller, and a broken exchange spoils nothing but its own connection.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import orjson
from anyio.streams.buffered import BufferedByteReceiveStream

from managed_agents.sandbox.backend import (
    BadArchive,
    CallUnknown,
    FileChanging,
    LimitHit,
    Outcome,
    PathNotFound,
    SandboxBusy,
    SandboxError,
    StaleEpoch,
)
from managed_agents.sandbox.runner import frames
from managed_agents.sandbox.stream import UnixStream

IDLE_CONNECTIONS_MAX = 4
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""A runner at work says so every five seconds."""
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
SOCKET_PATH_BYTES_MAX = 107


class RunnerLost(Exception):
    """The connection failed. Whether the runner lives is another question."""


class RunnerSilent(RunnerLost):
    """Nothing was heard for `SILENCE_SECONDS`: the runner stands still, or cannot be heard."""


def error_of(header: frames.Header) -> SandboxError:
    """Turn an error frame into an exception."""
    code, message = str(header.get("code")), str(header.get("message"))
    match code:
        case "stale_epoch":
            return StaleEpoch(message)
        case "unknown" | "acknowledged":
            return CallUnknown(message)
        case "busy":
            return SandboxBusy(message)
        case "limit_disk":
            return LimitHit("disk", message)
        case "limit_pids":
            return LimitHit("pids", message)
        case "changed":
            return FileChanging(message)
        case "not_found":
            return PathNotFound(message)
        case "bad_archive":
            return BadArchive(message)
        case _:
            return SandboxError(message)


class Exchange:
    """One request and its answer on a leased connection."""

    def __init__(self, stream: UnixStream) -> None:
        self._stream = stream
        self._buffered = BufferedByteReceiveStream(stream)
        self.number = 0
        self.complete = False
        self._credit = frames.WINDOW_BYTES

    def begin(self) -> None:
        """Take the next stream number."""
        self.number += 1
        self.complete = False
        self._credit = frames.WINDOW_BYTES

    async def _write(self, header: frames.Header, body: bytes = b"") -> None:
        try:
            with anyio.fail_after(SILENCE_SECONDS):
                await self._stream.send(frames.encode({**header, "v": 1, "stream": self.number}, body))
        except TimeoutError as error:
            raise RunnerSilent("the runner does not read") from error
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise RunnerLost("the runner does not read") from error

    async def send(self, header: frames.Header, body: bytes = b"") -> None:
        """Write one frame, waiting for credit. Raises: SandboxError when the runner refuses meanwhile."""
        while self._credit < len(body):
            await self._read_credit()
        self._credit -= len(body)
        await self._write(header, body)

    async def _read_credit(self) -> None:
        header, _ = await self._read()
        if header.get("op") == "error":
            raise error_of(header)
        if header.get("op") == "credit":
            self._credit += int(header["bytes"])

    async def send_message(self, header: frames.Header, body: bytes) -> None:
        """Write a message whose whole body is at hand."""
        for frame, chunk in frames.split(header, body):
            await self.send(frame, chunk)

    async def _read(self) -> tuple[frames.Header, bytes]:
        try:
            with anyio.fail_after(SILENCE_SECONDS):
                prefix = await self._buffered.receive_exactly(frames.PREFIX.size)
                header_length, body_length = frames.lengths(prefix)
                header = frames.decode_header(await self._buffered.receive_exactly(header_length))
                return header, await self._buffered.receive_exactly(body_length) if body_length else b""
        except TimeoutError as error:
            raise RunnerSilent("the runner does not answer") from error
        except (
            anyio.EndOfStream,
            anyio.IncompleteRead,
            anyio.BrokenResourceError,
            anyio.ClosedResourceError,
            frames.FrameError,
        ) as error:
            raise RunnerLost(f"the runner does not answer: {type(error).__name__}") from error

    async def receive(self) -> tuple[frames.Header, bytes]:
        """Read the next frame of the answer. Raises: SandboxError for an error frame."""
        while True:
            header, body = await self._read()
            operation = header.get("op")
            if operation == "working":
                continue
            if operation == "credit":
                self._credit += int(header["bytes"])
                continue
            if operation == "error":
                # After an error the runner may still have parts of the request under way: not to be used
                # again.
                raise error_of(header)
            if header.get("more"):
                if body:
                    await self._write({"op": "credit", "bytes": len(body)})
            else:
                self.complete = True
            return header, body

    async def receive_message(self) -> tuple[frames.Header, bytes]:
        """Read a whole answer, at most `MESSAGE_BYTES_MAX`."""
        header, body = await self.receive()
        if self.complete:
            return header, body
        parts, size = [body], len(body)
        while not self.complete:
            _, body = await self.receive()
            parts.append(body)
            size += len(body)
            if size > MESSAGE_BYTES_MAX:
                raise SandboxError("the runner's answer is too large")
        return header, b"".join(parts)

    async def outcome(self) -> Outcome:
        """Read the answer to `call` or `attach`."""
        header, body = await self.receive_message()
        content: list[dict[str, Any]] = orjson.loads(body)
        return Outcome(content, bool(header["is_error"]), header.get("spill_path"))

    async def aclose(self) -> None:
        await self._stream.aclose()


class RunnerClient:
    """Leases connections to one runner."""

    def __init__(self, socket: Path) -> None:
        if len(str(socket).encode()) > SOCKET_PATH_BYTES_MAX:
            raise SandboxError(f"{socket} is too long for a socket; set a shorter MANAGED_AGENTS_RUN_DIR")
        self._socket = socket
        self._idle: list[Exchange] = []

    @asynccontextmanager
    async def exchange(self, *, fresh: bool = False) -> AsyncGenerator[Exchange]:
        """Lease a connection; `fresh` after an idle one turned out dead.

        Raises: RunnerLost.
        """
        lease = None if fresh or not self._idle else self._idle.pop()
        if lease is None:
            lease = await self._connect()
        lease.begin()
        try:
            yield lease
        finally:
            if lease.complete and len(self._idle) < IDLE_CONNECTIONS_MAX:
                self._idle.append(lease)
            else:
                with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                    await lease.aclose()

    async def _connect(self) -> Exchange:
        try:
            with anyio.fail_after(CONNECT_SECONDS):
                return Exchange(await UnixStream.connect(self._socket))
        except (OSError, TimeoutError) as error:
            raise RunnerLost(f"cannot connect to the runner: {error}") from error

    async def request(self, header: frames.Header, body: bytes = b"", *, fresh: bool = False) -> tuple[frames.Header, bytes]:
        """Send a message and read the answer."""
        async with self.exchange(fresh=fresh) as exchange:
            await exchange.send_message(header, body)
            return await exchange.receive_message()

    async def aclose(self) -> None:
        """Close idle connections."""
        while self._idle:
            await self._idle.pop().aclose()
