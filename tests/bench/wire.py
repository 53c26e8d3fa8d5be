"""A bare HTTP/1.1 client on asyncio streams: what it costs itself is next to nothing, so figures are the server's."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import orjson


class Connection:
    """One kept-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: Mapping[str, str]) -> None:
        self.reader = reader
        self._writer = writer
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {"host": "bench", **headers}.items())

    async def request(self, method: str, path: str, body: Any = None) -> Any:
        """One exchange; returns the JSON of a 200."""
        status, length = await self.begin(method, path, body)
        answer = await self.reader.readexactly(length)
        if status != 200:
            raise RuntimeError(f"{method} {path}: {status} {answer[:500]!r}")
        return orjson.loads(answer)

    async def begin(self, method: str, path: str, body: Any = None) -> tuple[int, int]:
        """Send a request and read the head of the answer: status and content length."""
        content = b"" if body is None else orjson.dumps(body)
        lines = (
            f"{method} {path} HTTP/1.1\r\n{self._head}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        self._writer.write(lines.encode() + content)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0]) if b"content-length: " in head else 0
        return int(head[9:12]), length

    async def until(self, mark: bytes) -> None:
        """Read a stream until `mark` was in it."""
        tail = b""
        while mark not in tail:
            chunk = await self.reader.read(65536)
            if not chunk:
                raise RuntimeError("the stream ended")
            tail = tail[-len(mark) :] + chunk

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def connected(base_url: str, headers: Mapping[str, str]) -> AsyncIterator[Connection]:
    """Open a connection for the block."""
    connection = await connect(base_url, headers)
    try:
        yield connection
    finally:
        connection.close()


async def connect(base_url: str, headers: Mapping[str, str]) -> Connection:
    """Open a connection; the caller closes it."""
    url = urlsplit(base_url)
    assert url.hostname is not None
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 20)
    return Connection(reader, writer, headers)
