"""The one that stops and destroys sandboxes of this host; nothing else does.

Stops those whose session rests and which nobody used for a while (files stay), destroys those of deleted or archived sessions
and of lower generations, and whatever of ours the backend knows and no row does: the leftovers of a crash.
"""

import logging

import anyio

from managed_agents.db.engine import Database
from managed_agents.resources.sessions import bindings
from managed_agents.sandbox.backend import SandboxBackend, SandboxError

logger = logging.getLogger(__name__)


class SandboxCollector:
    """Looks at the sandboxes of one host."""

    def __init__(self, db: Database, backend: SandboxBackend, *, host: str, idle_seconds: float) -> None:
        self._db = db
        self._backend = backend
        self._host = host
        self._idle_seconds = idle_seconds

    async def stop_resting(self) -> None:
        """Stop every running sandbox of this host whose session rests, unless another worker lives here.

        For the end of the host's last worker: nothing of ours keeps running on a machine where the server was stopped.
        """
        async with self._db.transaction() as tx:
            if await bindings.workers_on(tx, host=self._host) > 0:
                return
        await self._stop_unused(idle_seconds=0.0)

    async def look(self) -> None:
        """Look once. Safe to repeat, and in several processes of the host at once."""
        await self._stop_unused(idle_seconds=self._idle_seconds)
        async with self._db.transaction() as tx:
            for binding in await bindings.doomed(tx, host=self._host):
                await bindings.set_state(tx, binding.sandbox_id, "destroyed")
        for sandbox_id, generation in await self._backend.collect_orphans(self._known):
            logger.info("destroyed sandbox %s generation %d: nothing needs it", sandbox_id, generation)

    async def _known(self) -> set[tuple[str, int]]:
        async with self._db.transaction() as tx:
            return await bindings.known(tx, host=self._host)

    async def _stop_unused(self, *, idle_seconds: float) -> None:
        running = {labelled.id for labelled in await self._backend.list() if labelled.running}
        async with self._db.transaction() as tx:
            unused = await bindings.unused(tx, host=self._host, idle_seconds=idle_seconds)
        async with anyio.create_task_group() as group:
            for binding in unused:
                if binding.sandbox_id in running:
                    group.start_soon(self._stop, binding.sandbox_id)

    async def _stop(self, sandbox_id: str) -> None:
        try:
            sandbox = await self._backend.attach(sandbox_id)
            await sandbox.stop()
        except SandboxError as error:
            logger.warning("sandbox %s not stopped: %s", sandbox_id, error)
