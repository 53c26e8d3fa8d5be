"""A client that misses nothing: the documented recipe for reconnecting to a session's stream.

Open the stream first, then list the history, then follow the stream and drop what is known. A stream replays nothing, so any
other order leaves a gap.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx2
from anthropic import APIConnectionError, APIStatusError, AsyncAnthropic

from tests.support.cluster import history
from tests.support.waiting import until

Event = dict[str, Any]
RECONNECT_SECONDS = 0.05


@dataclass
class Follower:
    """What one client has seen of a session: `events` in order, `queued` the copies shown before they were processed."""

    client: AsyncAnthropic
    session_id: str
    events: list[Event] = field(default_factory=list[Event])
    queued: list[Event] = field(default_factory=list[Event])
    connections: int = 0
    _known: set[str] = field(default_factory=set[str])
    _changed: anyio.Event = field(default_factory=anyio.Event)

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                async with await self.client.beta.sessions.events.stream(self.session_id) as stream:
                    self.connections += 1
                    for event in await history(self.client, self.session_id):
                        self._see(event)
                    async for event in stream:
                        self._see(event.to_dict(mode="json"))
            except (APIConnectionError, APIStatusError, httpx2.TransportError):
                await anyio.sleep(RECONNECT_SECONDS)

    def _see(self, event: Event) -> None:
        if event["processed_at"] is None:
            self.queued.append(event)
        elif event["id"] not in self._known:
            self._known.add(event["id"])
            self.events.append(event)
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, seen: Callable[[list[Event]], bool], *, seconds: float = 30.0) -> list[Event]:
        """Wait until what was seen is enough, and return it."""
        try:
            with anyio.fail_after(seconds):
                while not seen(self.events):
                    await self._changed.wait()
        except TimeoutError:
            newest = [event["type"] for event in self.events[-30:]]
            raise AssertionError(f"not seen in {seconds} s; {len(self.events)} seen, the newest {newest}") from None
        return list(self.events)

    async def has(self, event_type: str, count: int = 1) -> list[Event]:
        """Wait until so many events of a type were seen."""
        return await self.until(lambda events: sum(event["type"] == event_type for event in events) >= count)

    async def idle(self, count: int = 1) -> list[Event]:
        """Wait until the session has become idle so many times."""
        return await self.has("session.status_idle", count)


@asynccontextmanager
async def following(client: AsyncAnthropic, session_id: str) -> AsyncIterator[Follower]:
    """Follow a session while the block runs; it begins connected."""
    follower = Follower(client, session_id)
    async with anyio.create_task_group() as group:
        group.start_soon(follower.run)
        await until(lambda: follower.connections)
        yield follower
        group.cancel_scope.cancel()
