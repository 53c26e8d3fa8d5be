"""A unix socket as a byte stream.

Not anyio's: a stream of its own that is cancelled while data arrives lets the event loop call `set_result` on a cancelled
future, which is logged as a bug. The loop's own socket calls do not, and cost no more.
"""

import asyncio
import socket
from pathlib import Path

import anyio
from anyio.abc import ByteReceiveStream


class UnixStream(ByteReceiveStream):
    """One reader and one writer at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    @classmethod
    async def connect(cls, path: Path) -> "UnixStream":
        """Raises: OSError."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(made, str(path))
        except BaseException:
            made.close()
            raise
        return cls(made)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Raises: EndOfStream, BrokenResourceError."""
        try:
            data = await asyncio.get_running_loop().sock_recv(self._socket, max_bytes)
        except OSError as error:
            raise anyio.BrokenResourceError from error
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises: BrokenResourceError."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, data)
        except OSError as error:
            raise anyio.BrokenResourceError from error

    async def aclose(self) -> None:
        self._socket.close()
