"""Frames in, answers out: one `Connection` per client, many streams on each.

A client that goes away takes nothing with it: calls go on, their outcomes wait. A stream has credit in both
directions; who exceeds it loses the connection.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any, cast

from . import frames
from .calls import Calls, Refused
from .children import ChildFailed
from .config import Config
from .journal import Outcome
from .toolerror import ToolError
from .transfer import Sink, error_header, root_remove, root_sink

INPUT_BYTES_MAX = 33 * 1024 * 1024
STREAMS_MAX = 256
TRANSFER_SECONDS_MAX = 3600.0
WORKING_SECONDS = 5.0
"""How often a waiting client hears that the runner lives."""


class Stream:
    """One request and its answer."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self.number = number
        self._inbox: list[tuple[frames.Header, bytes]] = []
        self._arrived = asyncio.Event()
        self._outstanding = 0
        self._credit = frames.WINDOW_BYTES
        self._granted = asyncio.Event()
        self.task: asyncio.Future[None] | None = None

    def arrive(self, header: frames.Header, body: bytes) -> None:
        """Take a frame from the connection's reader."""
        self._outstanding += len(body)
        if self._outstanding > frames.WINDOW_BYTES:
            raise frames.FrameError(f"stream {self.number} exceeded its credit")
        self._inbox.append((header, body))
        self._arrived.set()

    def grant(self, size: int) -> None:
        self._credit += size
        self._granted.set()

    async def receive(self) -> tuple[frames.Header, bytes]:
        """Return the next frame and give its credit back."""
        while not self._inbox:
            self._arrived.clear()
            await self._arrived.wait()
        header, body = self._inbox.pop(0)
        self._outstanding -= len(body)
        if header.get("more") and body:
            await self._connection.write({"op": "credit", "stream": self.number, "bytes": len(body)})
        return header, body

    async def receive_body(self) -> bytes:
        """Return the whole body of the request, at most `INPUT_BYTES_MAX`."""
        header, body = await self.receive()
        parts, size = [body], len(body)
        while header.get("more"):
            header, body = await self.receive()
            parts.append(body)
            size += len(body)
            if size > INPUT_BYTES_MAX:
                raise Refused("bad_request", f"a request may have {INPUT_BYTES_MAX} bytes")
        return b"".join(parts)

    async def send(self, header: frames.Header, body: bytes = b"") -> None:
        """Write one frame, waiting for credit."""
        while self._credit < len(body):
            self._granted.clear()
            await self._granted.wait()
        self._credit -= len(body)
        await self._connection.write({**header, "stream": self.number}, body)

    async def send_message(self, header: frames.Header, body: bytes = b"") -> None:
        """Write a message whose whole body is at hand."""
        for frame, chunk in frames.split(header, body):
            await self.send(frame, chunk)


class Connection:
    """Reads frames and starts a task per stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, runner: Runner) -> None:
        self._reader, self._writer, self._runner = reader, writer, runner
        self._streams: dict[int, Stream] = {}

    async def write(self, header: frames.Header, body: bytes = b"") -> None:
        self._writer.write(frames.encode({"v": frames.VERSION, **header}, body))
        await self._writer.drain()

    async def serve(self) -> None:
        """Read until the client goes away; then end what only it wanted."""
        try:
            while True:
                prefix = await self._reader.readexactly(frames.PREFIX.size)
                header_length, body_length = frames.lengths(prefix)
                header = frames.decode_header(await self._reader.readexactly(header_length))
                body = await self._reader.readexactly(body_length) if body_length else b""
                self._dispatch(header, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client went away, as clients do
        except frames.FrameError as error:
            self._writer.write(frames.encode({"op": "error", "code": "protocol", "message": str(error), "stream": 0}))
        finally:
            for stream in self._streams.values():
                if stream.task is not None:
                    stream.task.cancel()
            self._writer.close()

    def _dispatch(self, header: frames.Header, body: bytes) -> None:
        number, operation = header.get("stream"), header.get("op")
        if header.get("v", frames.VERSION) != frames.VERSION or not isinstance(number, int):
            raise frames.FrameError("bad version or stream")
        stream = self._streams.get(number)
        if operation == "credit" or operation == "data" or operation == "close":
            if stream is None:
                return  # a stream that has just ended
            if operation == "data":
                stream.arrive(header, body)
            elif operation == "credit":
                stream.grant(int(header.get("bytes", 0)))
            elif stream.task is not None:
                stream.task.cancel()
            return
        if stream is not None or len(self._streams) >= STREAMS_MAX:
            raise frames.FrameError(f"stream {number} is taken, or too many streams")
        stream = self._streams[number] = Stream(self, number)
        stream.arrive(header, body)
        stream.task = asyncio.ensure_future(self._serve_stream(stream, header))

    async def _serve_stream(self, stream: Stream, header: frames.Header) -> None:
        try:
            await self._runner.handle(stream, header)
        except Refused as error:
            await stream.send({"op": "error", "code": error.code, "message": str(error)})
        except ChildFailed as error:
            await stream.send({"op": "error", "code": error.code, "message": str(error)})
        except (ToolError, OSError) as error:
            if not isinstance(error, ConnectionError):
                await stream.send(error_header(error))
        finally:
            self._streams.pop(stream.number, None)


CHILD_ANSWERS = ("file", "data", "ok", "error")


class Runner:
    """The operations."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.calls = Calls(config)
        self._operations: dict[str, Callable[[Stream, frames.Header], Awaitable[None]]] = {
            "hello": self._hello,
            "call": self._call,
            "attach": self._attach,
            "cancel": self._cancel,
            "ack": self._ack,
            "put": self._put,
            "get": self._get,
            "take": self._take,
            "save": self._save,
            "snapshot": self._snapshot,
            "restore": self._restore,
            "stat": self._stat,
            "remove": self._remove,
        }

    async def handle(self, stream: Stream, header: frames.Header) -> None:
        """Serve one request. The fence comes before everything else."""
        operation = self._operations.get(str(header.get("op")))
        if operation is None:
            raise Refused("bad_request", f"no operation {header.get('op')}")
        if "epoch" in header:
            self.calls.check_epoch(header["epoch"])
        await operation(stream, header)

    async def _hello(self, stream: Stream, header: frames.Header) -> None:
        del header
        await stream.send({"op": "hello", "epoch": self.calls.journal.epoch, "pid": os.getpid()})

    async def _call(self, stream: Stream, header: frames.Header) -> None:
        self.calls.check_epoch(header.get("epoch"))
        body = await stream.receive_body()
        try:
            arguments: Any = json.loads(body)
        except ValueError as error:
            raise Refused("bad_request", "input is not JSON") from error
        seconds = header.get("deadline_seconds")
        if not isinstance(arguments, dict) or not isinstance(seconds, (int, float)) or seconds <= 0:
            raise Refused("bad_request", "input must be an object and deadline_seconds positive")
        given = cast("dict[str, Any]", arguments)
        self.calls.begin(_id(header), str(header.get("name")), given, float(seconds))
        await self._answer(stream, _id(header))

    async def _attach(self, stream: Stream, header: frames.Header) -> None:
        self.calls.check_epoch(header.get("epoch"))
        self.calls.find(_id(header))
        await self._answer(stream, _id(header))

    async def _answer(self, stream: Stream, tool_use_id: str) -> None:
        call = self.calls.find(tool_use_id)
        while not call.done.is_set():
            waiting = asyncio.ensure_future(call.done.wait())
            try:
                await asyncio.wait([waiting], timeout=WORKING_SECONDS)
            finally:
                waiting.cancel()
            if not call.done.is_set():
                await stream.send({"op": "working"})
        outcome: Outcome = self.calls.journal.outcome(tool_use_id)
        await stream.send_message(outcome.header(), outcome.content)

    async def _cancel(self, stream: Stream, header: frames.Header) -> None:
        self.calls.check_epoch(header.get("epoch"))
        await self.calls.cancel(_id(header))
        await stream.send({"op": "ok"})

    async def _ack(self, stream: Stream, header: frames.Header) -> None:
        self.calls.acknowledge(_id(header))
        await stream.send({"op": "ok"})

    async def _put(self, stream: Stream, header: frames.Header) -> None:
        path, mode = str(header.get("path")), int(header.get("mode", 0o644)) & 0o777
        await self.calls.quota.check()
        if header.get("owner") == "root":
            await self._put_as_root(stream, path, mode)
            return
        await self._pass_on(stream, {"op": "put", "path": path, "mode": mode, "seconds": TRANSFER_SECONDS_MAX})

    async def _restore(self, stream: Stream, header: frames.Header) -> None:
        del header
        await self._pass_on(stream, {"op": "restore", "seconds": TRANSFER_SECONDS_MAX})

    async def _save(self, stream: Stream, header: frames.Header) -> None:
        del header
        await self.calls.save_shell()
        await stream.send({"op": "ok"})

    async def _snapshot(self, stream: Stream, header: frames.Header) -> None:
        await self.calls.save_shell()
        await self._get(stream, header)

    async def _pass_on(self, stream: Stream, request: frames.Header) -> None:
        """Have a child with the commands' uid take the frames that follow."""
        async with self.calls.children.open(request) as channel:
            more = True
            while more:
                frame, body = await stream.receive()
                more = bool(frame.get("more"))
                await channel.send({"op": "data", "more": True}, body[: frames.CHUNK_BYTES])
                for offset in range(frames.CHUNK_BYTES, len(body), frames.CHUNK_BYTES):
                    await channel.send({"op": "data", "more": True}, body[offset : offset + frames.CHUNK_BYTES])
            await channel.send({"op": "data"})
            await channel.receive()
        await stream.send({"op": "ok"})

    async def _put_as_root(self, stream: Stream, path: str, mode: int) -> None:
        mapped = self._config.resolve(path)
        sink: Sink = root_sink(mapped, mode, [self._config.resolve(root) for root in self._config.root_owned])
        try:
            more = True
            while more:
                frame, body = await stream.receive()
                more = bool(frame.get("more"))
                sink.write(body)
        except BaseException:
            sink.abandon()
            raise
        sink.finish()
        await stream.send({"op": "ok"})

    async def _remove(self, stream: Stream, header: frames.Header) -> None:
        mapped = self._config.resolve(str(header.get("path")))
        root_remove(mapped, [self._config.resolve(root) for root in self._config.root_owned])
        await stream.send({"op": "ok"})

    async def _get(self, stream: Stream, header: frames.Header) -> None:
        await self._answer_with(stream, {"op": header["op"], "path": str(header.get("path"))})

    async def _take(self, stream: Stream, header: frames.Header) -> None:
        place = {"root": str(header.get("root")), "path": str(header.get("path"))}
        await self._answer_with(stream, {"op": "take", **place, "changing": bool(header.get("changing"))})

    async def _answer_with(self, stream: Stream, request: frames.Header) -> None:
        """Pass on what a child with the commands' uid sends."""
        async with self.calls.children.open({**request, "seconds": TRANSFER_SECONDS_MAX}) as channel:
            more = True
            while more:
                frame, body = await channel.receive()
                more = bool(frame.get("more"))
                if (operation := frame.get("op")) not in CHILD_ANSWERS:
                    raise ChildFailed("failed", "the transfer's process was tampered with")
                answer: frames.Header = {"op": str(operation), "more": more}
                if isinstance(frame.get("size"), int):
                    answer["size"] = frame["size"]
                await stream.send(answer, body)

    async def _stat(self, stream: Stream, header: frames.Header) -> None:
        digests = bool(header.get("digests", True))  # which older workers do not say
        request = {"op": "listing", "path": str(header.get("path")), "digests": digests, "seconds": TRANSFER_SECONDS_MAX}
        async with self.calls.children.open(request) as channel:
            _, body = await channel.receive_message()
        await stream.send_message({"op": "listing"}, body)


def _id(header: frames.Header) -> str:
    tool_use_id = header.get("tool_use_id")
    if not isinstance(tool_use_id, str) or not 0 < len(tool_use_id) <= 256:
        raise Refused("bad_request", "tool_use_id is required")
    return tool_use_id
