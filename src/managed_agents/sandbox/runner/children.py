"""The runner's side of the file tools' process: hand over a socket, exchange one request on it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from . import frames
from .config import Config

BEGIN_SECONDS_MAX = 10.0
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from {0} import zygote; zygote.main(int(sys.argv[2]), sys.argv[3])"


def top_directory(package: str) -> str:
    """The directory that holds the top of this package, whose name in this process is `package`."""
    top = os.path.abspath(__file__)
    for _ in range(package.count(".") + 2):
        top = os.path.dirname(top)
    return top


class ChildFailed(Exception):
    """A child ended without an answer, or reported `code`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Channel:
    """Frames to and from one child."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, header: frames.Header, body: bytes = b"") -> None:
        """Write one message, waiting while the child does not read."""
        try:
            for frame, chunk in frames.split(header, body):
                await self._loop.sock_sendall(self._sock, frames.encode(frame, chunk))
        except OSError:
            # The child stopped reading; why is in its answer, which the next receive() returns.
            return

    async def _exactly(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            part = await self._loop.sock_recv(self._sock, min(size, 1 << 20))
            if not part:
                raise ChildFailed("ended", "the process serving this call ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    async def receive(self) -> tuple[frames.Header, bytes]:
        """Read one frame. Raises: ChildFailed when the child ended, spoke nonsense or reports an error."""
        try:
            header_length, body_length = frames.lengths(await self._exactly(frames.PREFIX.size))
            header = frames.decode_header(await self._exactly(header_length))
            body = await self._exactly(body_length)
        except (OSError, frames.FrameError) as error:
            raise ChildFailed("ended", f"the process serving this call failed: {error}") from error
        if header.get("op") == "error":
            raise ChildFailed(str(header.get("code", "failed")), str(header.get("message", "")))
        return header, body

    async def begun(self, seconds: float) -> bool:
        """Wait for the fork's first frame. Raises: ChildFailed when there is no process for a fork."""
        first = asyncio.ensure_future(self.receive())
        try:
            await asyncio.wait([first], timeout=seconds)
            return first.done() and first.result()[0].get("op") == "begun"
        except ChildFailed as error:
            if error.code != "ended":
                raise
            return False
        finally:
            first.cancel()

    async def receive_message(self) -> tuple[frames.Header, bytes]:
        """Read a whole message, at most `MESSAGE_BYTES_MAX`."""
        header, body = await self.receive()
        parts, frame, size = [body], header, len(body)
        while frame.get("more"):
            frame, body = await self.receive()
            parts.append(body)
            size += len(body)
            if size > MESSAGE_BYTES_MAX:
                raise ChildFailed("failed", "the answer is too large")
        return header, b"".join(parts)


class Children:
    """Keeps the file tools' process, replaces it when it died."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start the process. Raises: OSError when no process can be made."""
        self.stop()
        ours, theirs = socket.socketpair()
        package = __name__.rpartition(".")[0]
        uid = self._config.uid
        command = [sys.executable, "-I", "-S", "-B", "-c", _BOOT.format(package), top_directory(package)]
        command += [str(theirs.fileno()), self._config.to_json()]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=self._config.environment,
                cwd="/",
                start_new_session=True,
                user=uid,
                group=uid,
                extra_groups=None if uid is None else [],
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours

    def stop(self) -> None:
        """End the process; forks at work finish on their own."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _hand_over(self, sock: socket.socket) -> subprocess.Popen[bytes]:
        """Give the process a request's socket; return the process that has it."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        assert self._control is not None
        try:
            socket.send_fds(self._control, [b"x"], [sock.fileno()])
        except OSError:
            # It died since we looked.
            self.start()
            socket.send_fds(self._control, [b"x"], [sock.fileno()])
        assert self._process is not None
        return self._process

    @asynccontextmanager
    async def open(self, header: frames.Header) -> AsyncGenerator[Channel]:
        """Have a fork serve the request `header`. Leaving closes the socket, which ends a fork still at
        work.
        """
        sock = await self._begin(header, retry=True)
        with sock:
            yield Channel(sock)

    async def _begin(self, header: frames.Header, *, retry: bool) -> socket.socket:
        """Return a socket on which a fork said that it begins.

        A command of the same uid may kill or stop the process at any moment. What has not begun by then is
        given to its successor; what has begun is not, or it might run twice.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                ours.setblocking(False)
                process = self._hand_over(theirs)
            channel = Channel(ours)
            await channel.send(header)
            if await channel.begun(min(float(header["seconds"]), BEGIN_SECONDS_MAX)):
                return ours
        except BaseException:
            ours.close()
            raise
        ours.close()
        if self._process is process:
            # Not its successor, to which another request may have gone meanwhile.
            self.stop()
        if not retry:
            raise ChildFailed("ended", "the process of the file tools does not answer")
        return await self._begin(header, retry=False)
