"""What wakes a runner in the middle of a step: new input for its session, or the end of one of its calls.

A wake-up is a hint and may come for nothing; whether an interrupt waits is asked of the database.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from sqlalchemy import text

from managed_agents.db.engine import Database

T = TypeVar("T")

_HAS_INTERRUPT = text("SELECT EXISTS (SELECT 1 FROM inbox WHERE session_id = :session_id AND type = 'user.interrupt')")


class Changes:
    """Tells the one task that waits for it that something changed."""

    def __init__(self, db: Database, session_id: str) -> None:
        self._db = db
        self._session_id = session_id
        self._changed = anyio.Event()

    def notify(self) -> None:
        """Something changed."""
        self._changed.set()

    async def next(self) -> None:
        """Wait until something changed since this was last called."""
        await self._changed.wait()
        self._changed = anyio.Event()

    async def until_interrupted(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """Run `work`; None when an interrupt came first, and `work` is cancelled."""
        result: T | None = None
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await self._interrupt_arrived()
                group.cancel_scope.cancel()

            group.start_soon(watch)
            result = await work()
            group.cancel_scope.cancel()
        return result

    async def _interrupt_arrived(self) -> None:
        while True:
            await self.next()
            async with self._db.autocommit() as tx:
                if (await tx.execute(_HAS_INTERRUPT, {"session_id": self._session_id})).scalar_one():
                    return
