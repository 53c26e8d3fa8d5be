"""The one that pauses, stops and destroys sandboxes of this host; nothing else does.

Pauses those whose session has come to rest, so that what it left running takes no CPU. Stops those that nobody used for longer,
after a snapshot of their files; destroys those of deleted or archived sessions, of lower generations, too old, or stopped for
long; and whatever of ours the backend knows and no row does: the leftovers of a crash. A snapshot takes time, in which the
session may go on: the right to stop is claimed afterwards, and is not given for a sandbox that was used meanwhile. One that
died at rest stops in the records only: it must not keep its place, nor what is behind it from being stopped.
"""

import logging
from collections.abc import Sequence

import anyio
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.blobstore.store import BlobStore, BlobTooLarge
from managed_agents.core import limits
from managed_agents.db.engine import Database
from managed_agents.resources.sessions import bindings, clones, places, snapshots
from managed_agents.resources.sessions.bindings import Binding
from managed_agents.sandbox.backend import Sandbox, SandboxBackend, SandboxError, SandboxGone

logger = logging.getLogger(__name__)

SNAPSHOTS_AT_ONCE = 2
LOOK_COUNT_MAX = 50
PAUSE_SECONDS_MAX = 3.0
ATTACH_SECONDS_MAX = 90.0


class SandboxCollector:
    """Looks at the sandboxes of one host."""

    def __init__(
        self,
        db: Database,
        backend: SandboxBackend,
        blobs: BlobStore,
        *,
        host: str,
        pause_seconds: float,
        idle_seconds: float,
        parked_seconds: float,
    ) -> None:
        self._db = db
        self._backend = backend
        self._blobs = blobs
        self._host = host
        self._pause_seconds = pause_seconds
        self._idle_seconds = idle_seconds
        self._parked_seconds = parked_seconds
        self._slots = anyio.CapacityLimiter(SNAPSHOTS_AT_ONCE)
        self._stopping: set[str] = set()
        self._refused: set[str] = set()  # the engine would not pause them: they are left alone until they are stopped

    async def stop_resting(self) -> None:
        """Stop every running sandbox of this host whose session rests, unless another worker lives here.

        For the end of the host's last worker: nothing of ours keeps running on a machine where the server was stopped. Without
        snapshots, for which there is no time; the disks are kept.
        """
        async with self._db.transaction() as tx:
            if await bindings.workers_on(tx, host=self._host) > 0:
                return
        await self._stop_unused(idle_seconds=0.0, snapshot=False, count=None)

    async def look(self) -> None:
        """Look once. Safe to repeat, and in several processes of the host at once."""
        await self._stop_unused(idle_seconds=self._idle_seconds, snapshot=True)
        async with self._db.transaction() as tx:
            await bindings.doom(tx, host=self._host, parked_seconds=self._parked_seconds)
            await snapshots.expire(tx)
            await clones.expire(tx)
        for sandbox_id, generation in await self._backend.collect_orphans(self._known):
            logger.info("destroyed sandbox %s generation %d: nothing needs it", sandbox_id, generation)
        await self._backend.collect_images()

    async def relieve(self) -> None:
        """Stop as many sandboxes at rest, the longest unused, as sessions wait for a place. Looking again is safe."""
        async with self._db.transaction() as tx:
            count = await places.waiting(tx, host=self._host)
        if count:
            await self._stop_unused(idle_seconds=0.0, snapshot=True, count=count, places_only=True)

    async def _known(self) -> set[tuple[str, int]]:
        async with self._db.transaction() as tx:
            return await bindings.known(tx, host=self._host)

    async def pause_resting(self) -> None:
        """Pause every sandbox at rest that runs. One that died there has its time when it is to be stopped."""
        if "pause" not in self._backend.capabilities:
            return
        running = {labelled.id for labelled in await self._backend.list() if labelled.running}
        self._refused &= running
        behind: Binding | None = None
        while True:
            async with self._db.transaction() as tx:
                unused = await bindings.unused(
                    tx, host=self._host, idle_seconds=self._pause_seconds, count=LOOK_COUNT_MAX, states=["live"], behind=behind
                )
            if not unused:
                return
            behind = unused[-1]
            for binding in unused:
                if binding.sandbox_id in running - self._stopping - self._refused:
                    await self._pause(binding)

    async def _pause(self, binding: Binding) -> None:
        """Under the lock of its row, so that whoever wants the sandbox meanwhile waits, and finds it paused or as it was."""
        # A worker that ends does not leave it half done. The bound is shorter than what others wait for a lock.
        with anyio.move_on_after(PAUSE_SECONDS_MAX, shield=True) as scope:
            try:
                async with self._db.transaction() as tx:
                    if not await bindings.begin_pause(tx, binding):
                        return
                    await self._backend.pause(binding.sandbox_id)
                    await bindings.set_paused(tx, binding.sandbox_id)
                return
            except (SandboxError, SQLAlchemyError, OSError) as error:
                logger.warning("sandbox %s not paused: %s: %s", binding.sandbox_id, type(error).__name__, error)
                self._refused.add(binding.sandbox_id)
        if scope.cancelled_caught:
            logger.warning("sandbox %s not paused: it took too long", binding.sandbox_id)
        # The engine may have done it all the same.
        try:
            await self._backend.resume(binding.sandbox_id)
        except SandboxError as error:
            logger.warning("sandbox %s perhaps paused: %s", binding.sandbox_id, error)

    async def _stop_unused(
        self, *, idle_seconds: float, snapshot: bool, count: int | None = LOOK_COUNT_MAX, places_only: bool = False
    ) -> None:
        """Stop up to `count` sandboxes at rest, the longest unused first, and record the stop of those that died there, which
        count as well when it is about `places_only`. One that cannot be stopped never does: those behind it have their turn.
        """
        running = {labelled.id for labelled in await self._backend.list() if labelled.running}
        stopped, behind = 0, None
        while count is None or stopped < count:
            batch = LOOK_COUNT_MAX if count is None else min(count - stopped, LOOK_COUNT_MAX)
            async with self._db.transaction() as tx:
                unused = await bindings.unused(
                    tx, host=self._host, idle_seconds=idle_seconds, count=batch, running=list(running), behind=behind
                )
            if not unused:
                return
            behind = unused[-1]
            done = await self._stop_all(unused, running, snapshot=snapshot)
            stopped += sum(places_only or binding.sandbox_id in running for binding in done)

    async def _stop_all(self, unused: Sequence[Binding], running: set[str], *, snapshot: bool) -> Sequence[Binding]:
        """Returns those that were stopped."""
        stopped: list[Binding] = []

        async def stop(binding: Binding) -> None:
            try:
                if binding.state in ("live", "paused") and binding.sandbox_id in running:
                    self._stopping.add(binding.sandbox_id)
                    done = await self._stop(binding, snapshot=snapshot)
                else:
                    done = await self._settle(binding)
            except (SandboxError, SQLAlchemyError, OSError) as error:
                logger.warning("sandbox %s not stopped: %s: %s", binding.sandbox_id, type(error).__name__, error)
            else:
                stopped.extend([binding] if done else [])
            finally:
                self._stopping.discard(binding.sandbox_id)

        async with anyio.create_task_group() as group:
            for binding in unused:
                group.start_soon(stop, binding)
        return stopped

    async def _stop(self, binding: Binding, *, snapshot: bool) -> bool:
        """False when it was used meanwhile. Raises: SandboxError."""
        try:
            with anyio.fail_after(ATTACH_SECONDS_MAX):
                sandbox = await self._backend.attach(binding.sandbox_id)
        except SandboxGone:
            return await self._settle(binding)
        if snapshot:
            async with self._slots:
                await self._snapshot(sandbox)
        async with self._db.transaction() as tx:
            if not await bindings.begin_stop(tx, binding):
                await sandbox.aclose()
                return False
        await sandbox.stop()
        async with self._db.transaction() as tx:
            await bindings.set_stopped(tx, binding.sandbox_id)
        return True

    async def _settle(self, binding: Binding) -> bool:
        """Record the stop of a sandbox that takes no calls: it died at rest, or whoever stopped it died before it said so.

        Its disk is kept, so the next call finds the files as they are. Where nothing is left of it, the next sandbox begins
        with the snapshot, and the model is told what is older. False when it was used meanwhile. Raises: SandboxError.
        """
        async with self._db.transaction() as tx:
            if not await bindings.begin_stop(tx, binding):
                return False
        there = await self._backend.halt(binding.sandbox_id)
        async with self._db.transaction() as tx:
            await bindings.set_stopped(tx, binding.sandbox_id, gone=not there)
        logger.info("sandbox %s does not run any more: its place is free", binding.sandbox_id)
        return True

    async def _snapshot(self, sandbox: Sandbox) -> None:
        """Best effort: one that could not be taken leaves the one before, and the disk."""
        try:
            with anyio.fail_after(limits.SNAPSHOT_SECONDS_MAX):
                await snapshots.take(self._db, self._blobs, sandbox)
        except (SandboxError, BlobTooLarge, OSError, TimeoutError) as error:
            logger.warning("no snapshot of %s: %s: %s", sandbox.id, type(error).__name__, error)
