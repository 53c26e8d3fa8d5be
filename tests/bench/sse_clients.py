"""Many SSE clients in a process of their own, on raw sockets: they count frames and do nothing else.

    python -m tests.bench.sse_clients PORT PATH KEY CLIENTS EXPECTED

Prints `ready` when every stream is open, then the clock (`perf_counter`, the same in every process of the machine) when the
last client has got its last frame. Newlines end frames and nothing else: JSON has none.
"""

import asyncio
import sys
import time
from typing import cast

import uvloop

END = b"\n\n"
HEAD_END = b"\r\n\r\n"


class Client(asyncio.Protocol):
    """Counts the frames of one stream."""

    def __init__(self, request: bytes, expected: int, opened: asyncio.Queue[None], done: asyncio.Queue[float]) -> None:
        self._request = request
        self._left = expected
        self._opened, self._done = opened, done
        self._open = False
        self._last = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop has transports of its own kind
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._open:
            head, end, data = data.partition(HEAD_END)
            assert end, head
            assert b" 200 " in head.split(b"\r\n")[0], head
            self._open = True
            self._opened.put_nowait(None)
        if data:
            self._left -= data.count(END) + (self._last == b"\n" and data[:1] == b"\n")
            self._last = data[-1:]
            if self._left == 0:
                self._done.put_nowait(time.perf_counter())


async def main(port: int, path: str, key: str, clients: int, expected: int) -> None:
    opened: asyncio.Queue[None] = asyncio.Queue()
    done: asyncio.Queue[float] = asyncio.Queue()
    request = (
        f"GET {path} HTTP/1.1\r\nhost: bench\r\nx-api-key: {key}\r\nanthropic-version: 2023-06-01\r\n"
        "anthropic-beta: managed-agents-2026-04-01\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    transports: list[asyncio.BaseTransport] = []
    for _ in range(clients):
        transport, _ = await loop.create_connection(lambda: Client(request, expected, opened, done), "127.0.0.1", port)
        transports.append(transport)
        await opened.get()
    print("ready", flush=True)
    ends = [await done.get() for _ in range(clients)]
    print(max(ends), flush=True)
    for transport in transports:
        transport.close()


if __name__ == "__main__":
    port, path, key, clients, expected = sys.argv[1:]
    uvloop.run(main(int(port), path, key, int(clients), int(expected)))
