"""A model endpoint that misbehaves below HTTP: a proxy before the scripted model that refuses, hangs up or talks nonsense."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
from anyio.abc import SocketAttribute, SocketStream


class Meddler:
    """Passes connections on, except while a block says otherwise. Whatever it passes ends when a block begins."""

    def __init__(self) -> None:
        self._upstream = ("", 0)
        self._port = 0
        self._answer: bytes | None = None
        self._listening: anyio.CancelScope | None = None
        self._ready = anyio.Event()
        self._meddled = anyio.Event()
        self._up = anyio.Event()
        self.met = 0

    @asynccontextmanager
    async def between(self, base_url: str) -> AsyncIterator[str]:
        """Stand before `base_url`; yields the address to use instead."""
        url = urlsplit(base_url)
        self._upstream = (url.hostname or "", url.port or 0)
        self._up.set()
        async with anyio.create_task_group() as group:
            group.start_soon(self._run)
            await self._ready.wait()
            yield f"http://127.0.0.1:{self._port}"
            group.cancel_scope.cancel()

    async def _run(self) -> None:
        while True:
            await self._up.wait()
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=self._port)
            async with listener:
                self._port = listener.extra(SocketAttribute.local_port)
                with anyio.CancelScope() as self._listening:
                    self._ready.set()
                    await listener.serve(self._handle)

    @asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        """Refuse every connection while the block runs."""
        assert self._listening is not None
        self._up = anyio.Event()
        self._ready = anyio.Event()
        self._end_passing()
        self._listening.cancel()
        try:
            yield
        finally:
            self._up.set()
        await self._ready.wait()

    @asynccontextmanager
    async def answering(self, answer: bytes) -> AsyncIterator[None]:
        """Answer every new connection with these bytes, and close it, while the block runs."""
        self._end_passing()
        self._answer, self.met = answer, 0
        try:
            yield
        finally:
            self._answer = None

    async def _handle(self, stream: SocketStream) -> None:
        async with stream:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
                if self._answer is not None:
                    await stream.receive()
                    self.met += 1
                    await stream.send(self._answer)
                else:
                    await self._pass(stream)

    async def _pass(self, stream: SocketStream) -> None:
        async with await anyio.connect_tcp(*self._upstream) as upstream, anyio.create_task_group() as group:
            group.start_soon(self._end_with, self._meddled, group.cancel_scope)
            group.start_soon(self._copy, stream, upstream, group.cancel_scope)
            await self._copy(upstream, stream, group.cancel_scope)

    async def _copy(self, source: SocketStream, target: SocketStream, scope: anyio.CancelScope) -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
            while True:
                await target.send(await source.receive())
        scope.cancel()

    async def _end_with(self, meddled: anyio.Event, scope: anyio.CancelScope) -> None:
        await meddled.wait()
        scope.cancel()

    def _end_passing(self) -> None:
        self._meddled.set()
        self._meddled = anyio.Event()
