"""A session's stream as a test reads it through the SDK: what came, and waiting for what is to come."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

WAIT_SECONDS = 30.0


@dataclass
class Watch:
    """An open stream and everything it delivered so far."""

    events: list[Any] = field(default_factory=list[Any])
    ended: bool = False
    _changed: anyio.Event = field(default_factory=anyio.Event)

    def add(self, event: Any) -> None:
        self.events.append(event)
        self._changed.set()
        self._changed = anyio.Event()

    def end(self) -> None:
        self.ended = True
        self._changed.set()

    @property
    def logged(self) -> list[Any]:
        """What the history must hold too: everything but the null copies of queued events, `session.deleted` and previews."""
        lasting = [event for event in self.events if event.type not in ("session.deleted", "event_start", "event_delta")]
        return [event for event in lasting if event.processed_at is not None]

    @property
    def types(self) -> list[str]:
        return [event.type for event in self.logged]

    async def until(self, wanted: str | Callable[[Any], bool], *, count: int = 1) -> Any:
        """Wait for the `count`th event of a type (or that a function accepts), null copies aside; returns it."""
        accepts: Callable[[Any], bool] = wanted if callable(wanted) else lambda event: event.type == wanted
        with anyio.fail_after(WAIT_SECONDS):
            while True:
                found = [event for event in self.logged if accepts(event)]
                if len(found) >= count:
                    return found[count - 1]
                assert not self.ended, f"the stream ended: {self.types}"
                await self._changed.wait()

    async def idle(self, count: int = 1) -> Any:
        """Wait for the `count`th `session.status_idle`."""
        return await self.until("session.status_idle", count=count)

    async def end_reached(self) -> None:
        """Wait until the server closes the stream."""
        with anyio.fail_after(WAIT_SECONDS):
            while not self.ended:
                await self._changed.wait()
