"""`RunnerSandbox`: the handle that every backend with a runner shares.

What differs between backends is behind `Host`: whether the sandbox lives, stopping it, removing it.
"""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from typing import Protocol, TypeVar

import anyio

from managed_agents.sandbox import listing
from managed_agents.sandbox.backend import Call, FileEntry, Outcome, Owner, SandboxError, SandboxGone, SandboxUnreachable
from managed_agents.sandbox.client import SILENCE_SECONDS, Exchange, RunnerClient, RunnerLost, RunnerSilent
from managed_agents.sandbox.runner import frames

logger = logging.getLogger(__name__)

RECONNECT_SECONDS_MAX = 30.0
SAVE_SECONDS_MAX = 5.0
RECONNECT_FIRST_SECONDS = 0.005
RECONNECT_STEP_SECONDS_MAX = 0.5


T = TypeVar("T")


class Host(Protocol):
    """What the backend knows of one sandbox from outside."""

    async def death(self) -> str | None:
        """Say why the sandbox is dead; None while it lives."""
        ...

    async def stop(self) -> None: ...

    async def destroy(self) -> None: ...


class RunnerSandbox:
    """A sandbox reached through its runner's socket."""

    def __init__(self, id: str, generation: int, client: RunnerClient, host: Host) -> None:  # noqa: A002
        self._id, self._generation = id, generation
        self._client, self._host = client, host

    @property
    def id(self) -> str:
        return self._id

    @property
    def generation(self) -> int:
        return self._generation

    async def _persist(self, attempt: Callable[[Exchange], Awaitable[T]]) -> T:
        """Make an exchange, again and again while the runner lives but cannot be reached. For requests safe
        to repeat.

        An engine that restarts takes its containers with it and does not answer for a while: what became of this one is asked
        until it does. The bound counts from the first loss, because a call may have run for long before.

        Raises: SandboxGone, SandboxUnreachable.
        """
        deadline: float | None = None
        pause, fresh = 0.0, False
        while True:
            begun = anyio.current_time()
            try:
                async with self._client.exchange(fresh=fresh) as exchange:
                    return await attempt(exchange)
            except RunnerLost as lost:
                silent = isinstance(lost, RunnerSilent)
                if anyio.current_time() - begun - silent * SILENCE_SECONDS > RECONNECT_SECONDS_MAX:
                    deadline, pause, fresh = None, 0.0, False  # it was reached in between: another loss
                deadline = deadline or anyio.current_time() + RECONNECT_SECONDS_MAX
                await self._judge(lost, ask=fresh or silent, late=anyio.current_time() > deadline)
            fresh = True
            await anyio.sleep(pause)
            pause = min(max(2 * pause, RECONNECT_FIRST_SECONDS), RECONNECT_STEP_SECONDS_MAX)

    async def _judge(self, lost: RunnerLost, *, ask: bool, late: bool) -> None:
        """Return while trying again may do. Raises: SandboxGone, SandboxUnreachable."""
        if ask:
            try:
                death = await self._host.death()
            except SandboxError as error:
                if late:
                    raise SandboxUnreachable(str(error)) from error
                return
            if death is not None:
                raise SandboxGone(death) from lost
        if late:
            raise SandboxGone(f"the runner of {self._id} cannot be reached: {lost}") from lost

    async def _request(self, header: frames.Header, body: bytes = b"") -> tuple[frames.Header, bytes]:
        async def attempt(exchange: Exchange) -> tuple[frames.Header, bytes]:
            await exchange.send_message(header, body)
            return await exchange.receive_message()

        return await self._persist(attempt)

    async def hello(self) -> None:
        """Wait until the runner takes calls. Raises: SandboxGone."""
        await self._request({"op": "hello"})

    async def execute(self, call: Call) -> Outcome:
        header: frames.Header = {
            "op": "call",
            "tool_use_id": call.tool_use_id,
            "epoch": call.epoch,
            "name": call.name,
            "deadline_seconds": call.deadline_seconds,
        }
        # Not orjson: a model may produce lone surrogates, which it refuses.
        return await self._outcome(header, json.dumps(dict(call.input)).encode())

    async def collect(self, tool_use_id: str, epoch: int) -> Outcome:
        return await self._outcome({"op": "attach", "tool_use_id": tool_use_id, "epoch": epoch}, b"")

    async def _outcome(self, header: frames.Header, body: bytes) -> Outcome:
        async def attempt(exchange: Exchange) -> Outcome:
            await exchange.send_message(header, body)
            return await exchange.outcome()

        return await self._persist(attempt)

    async def cancel(self, tool_use_id: str, epoch: int) -> None:
        await self._request({"op": "cancel", "tool_use_id": tool_use_id, "epoch": epoch})

    async def ack(self, tool_use_id: str) -> None:
        await self._request({"op": "ack", "tool_use_id": tool_use_id})

    async def put(self, path: str, stream: AsyncIterable[bytes] | bytes, owner: Owner, mode: int = 0o644) -> None:
        await self._send({"op": "put", "path": path, "owner": owner, "mode": mode}, stream)

    async def restore(self, stream: AsyncIterable[bytes]) -> None:
        await self._send({"op": "restore"}, stream)

    async def _send(self, header: frames.Header, stream: AsyncIterable[bytes] | bytes) -> None:
        await self.hello()  # a stream can be sent only once: find the dead connection before
        try:
            async with self._client.exchange() as exchange:
                await exchange.send({**header, "more": True})
                async for chunk in _chunks(stream):
                    await exchange.send({"op": "data", "more": True}, chunk)
                await exchange.send({"op": "data"})
                await exchange.receive()
        except RunnerLost as lost:
            raise await self._broken(lost) from lost

    async def remove(self, path: str) -> None:
        await self._request({"op": "remove", "path": path})

    async def _broken(self, lost: RunnerLost) -> SandboxError:
        death = await self._host.death()
        return SandboxGone(death) if death is not None else SandboxError(f"the transfer broke: {lost}")

    def get(self, path: str) -> AsyncGenerator[bytes]:
        return self._read({"op": "get", "path": path})

    def snapshot(self) -> AsyncGenerator[bytes]:
        return self._read({"op": "snapshot"})

    async def _read(self, header: frames.Header) -> AsyncGenerator[bytes]:
        await self.hello()
        try:
            async with self._client.exchange() as exchange:
                await exchange.send(header)
                while not exchange.complete:
                    _, body = await exchange.receive()
                    if body:
                        yield body
        except RunnerLost as lost:
            raise await self._broken(lost) from lost

    def take(self, root: str, path: str, *, changing: bool = False) -> AsyncGenerator[bytes]:
        return self._read({"op": "take", "root": root, "path": path, "changing": changing})

    async def listing(self, path: str, *, digests: bool = True) -> list[FileEntry]:
        _, body = await self._request({"op": "stat", "path": path, "digests": digests})
        return listing.read(body)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def stop(self) -> None:
        with anyio.move_on_after(SAVE_SECONDS_MAX):
            try:
                await self._request({"op": "save"})
            except SandboxError as error:
                # One that is dead, or of an older release, stops without.
                logger.info("shell of %s not saved: %s", self._id, error)
        await self._client.aclose()
        await self._host.stop()

    async def destroy(self) -> None:
        await self._client.aclose()
        await self._host.destroy()


async def _chunks(stream: AsyncIterable[bytes] | bytes) -> AsyncGenerator[bytes]:
    if isinstance(stream, bytes):
        for offset in range(0, len(stream), frames.CHUNK_BYTES):
            yield stream[offset : offset + frames.CHUNK_BYTES]
        return
    async for piece in stream:
        for offset in range(0, len(piece), frames.CHUNK_BYTES):
            yield piece[offset : offset + frames.CHUNK_BYTES]
