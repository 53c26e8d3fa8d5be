"""Keeps sandboxes of some environments ready on this host, for the first call of a session not to wait for a container.

One made ahead is like any other of its environment, and holds nothing of anybody: what belongs to a session is put into it when
it is adopted, and nobody gets it after that. It is recorded before it is made, so a crash leaves nothing unseen. What is no
longer wanted is taken out of the records before it is destroyed; race: a session adopts it in that moment, which is taking it
out of the records too, so only one of them has it. A pool yields: it is not filled while sessions wait for a place, and gives up
what it has. Installing packages takes its own time, beside the looks, and one environment's trouble is no other's: what failed is
tried again later and later. One that died while nobody had it is replaced.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import anyio

from managed_agents.core import faults, ids
from managed_agents.db.engine import Database
from managed_agents.resources.sessions import bindings, places
from managed_agents.sandbox.backend import Packages, PackagesFailed, SandboxBackend, SandboxError, SandboxGone, SandboxSpec

logger = logging.getLogger(__name__)

RECORDED = faults.register("pool.recorded", "sandbox recorded to be made ahead, not created")
MADE = faults.register("pool.made", "sandbox made ahead, not recorded as ready")
READY_SECONDS_MAX = 3600.0  # then the image may have been replaced
MAKING_SECONDS_MAX = 180.0  # whoever makes one for longer has died
PROVISION_SECONDS_MAX = 120.0
LIST_SECONDS = 5.0  # between two looks at whether those that are ready still run: each asks the engine
# Seconds until something is tried again: at first, and at most.
PACKAGES_PAUSES = (60.0, 3600.0)
OTHER_PAUSES = (2.0, 60.0)


class _Pauses:
    """Which environments failed how often, and until when they are left alone."""

    def __init__(self) -> None:
        self._until: dict[str, tuple[float, float]] = {}

    def over(self, environment_id: str) -> bool:
        return anyio.current_time() >= self._until.get(environment_id, (0.0, 0.0))[0]

    def begin(self, environment_id: str, pauses: tuple[float, float]) -> None:
        first, most = pauses
        before = self._until.get(environment_id, (0.0, 0.0))[1]
        seconds = min(max(2 * before, first), most)
        self._until[environment_id] = (anyio.current_time() + seconds, seconds)

    def end(self, environment_id: str) -> None:
        self._until.pop(environment_id, None)


class SandboxPool:
    """The pools of one host; `pools` says how many of which environment."""

    def __init__(
        self,
        db: Database,
        backend: SandboxBackend,
        spec: Callable[[str, int, str | None, str], SandboxSpec],
        pools: Mapping[str, int],
        *,
        host: str,
        image: str,
        running_max: int = 0,
    ) -> None:
        self._db, self._backend, self._spec, self._pools = db, backend, spec, pools
        self._host, self._image, self._running_max = host, image, running_max
        self._images: dict[str, str] = {}  # by environment
        self._failed: dict[str, Packages] = {}  # which packages of which environment could not be installed
        self._preparing, self._filling = _Pauses(), _Pauses()
        self._listed_at = -LIST_SECONDS

    async def prepare(self, environment_id: str) -> None:
        """Have the image of an environment ready, which may take as long as installs may. Safe to repeat."""
        async with self._db.transaction() as tx:
            packages = (await bindings.packages_of_environments(tx, [environment_id])).get(environment_id)
        if packages is None:
            self._images.pop(environment_id, None)
            return
        if self._failed.get(environment_id) not in (None, packages):
            self._preparing.end(environment_id)  # others than those that failed
        if not self._preparing.over(environment_id):
            return
        try:
            self._images[environment_id] = await self._backend.prepare(self._image, packages)
        except PackagesFailed as error:
            self._images.pop(environment_id, None)
            self._failed[environment_id] = packages
            self._preparing.begin(environment_id, PACKAGES_PAUSES)
            logger.warning("no sandboxes ahead for %s: %s", environment_id, error)
        except SandboxError as error:
            self._preparing.begin(environment_id, OTHER_PAUSES)
            logger.warning("no sandboxes ahead for %s yet: %s", environment_id, error)
        else:
            self._failed.pop(environment_id, None)
            self._preparing.end(environment_id)

    async def look(self) -> None:
        """Look once, at environments whose image is ready. Safe to repeat, and in several processes of the host at once."""
        async with self._db.transaction() as tx:
            await places.expire(tx, host=self._host, ready_seconds=READY_SECONDS_MAX, making_seconds=MAKING_SECONDS_MAX)
            wait = await places.waiting(tx, host=self._host) if self._running_max else 0
            packages = await bindings.packages_of_environments(tx, list(self._pools)) if self._pools else {}
            there = await places.pooled(tx, host=self._host)
        wanted = {
            environment_id: replace(self._spec("", 0, None, environment_id), image=self._images[environment_id])
            for environment_id in packages
            if environment_id in self._images
        }
        if dead := await self._dead(there):
            async with self._db.transaction() as tx:
                await places.give_up(tx, list(dead), host=self._host)  # what is left of them, the collector removes
            there = [each for each in there if each.id not in dead]
        unwanted = [each.id for each in there if self._is_unwanted(each, packages.keys(), wanted)]
        pressed = [each.id for each in there if each.ready and each.id not in unwanted][:wait]
        await self._give_up([*unwanted, *pressed])
        for environment_id, spec in wanted.items():
            if not self._filling.over(environment_id):
                continue
            try:
                await self._fill(environment_id, spec)
            except (SandboxError, OSError, TimeoutError) as error:
                self._filling.begin(environment_id, OTHER_PAUSES)
                logger.warning("no sandboxes ahead for %s yet: %s: %s", environment_id, type(error).__name__, error)
            else:
                self._filling.end(environment_id)

    async def _dead(self, there: Sequence[places.Pooled]) -> set[str]:
        """Those that were ready and do not run any more: an engine that was killed ends them when it comes back."""
        ready = {each.id for each in there if each.ready}
        if not ready or anyio.current_time() < self._listed_at + LIST_SECONDS:
            return set()
        try:
            running = {labelled.id for labelled in await self._backend.list() if labelled.running}
        except (SandboxError, OSError, ValueError):
            # One that is just removed may be read in halves; an engine that is away says so where one is made or called.
            return set()
        self._listed_at = anyio.current_time()
        return ready - running

    def _is_unwanted(self, one: places.Pooled, kept: Collection[str], wanted: Mapping[str, SandboxSpec]) -> bool:
        """One whose image is being made ready may turn out to be wanted."""
        if one.environment_id in wanted:
            return one.fingerprint != wanted[one.environment_id].fingerprint
        return one.environment_id not in kept or one.environment_id in self._failed

    async def drain(self) -> None:
        """Give up the whole pool, unless another worker lives on this host: for the end of the host's last."""
        async with self._db.transaction() as tx:
            if await bindings.workers_on(tx, host=self._host) > 0:
                return
            there = await places.pooled(tx, host=self._host)
        await self._give_up([each.id for each in there])

    async def _fill(self, environment_id: str, spec: SandboxSpec) -> None:
        for _ in range(self._pools[environment_id]):
            sandbox_id = ids.new_id(ids.SANDBOX)
            async with self._db.transaction() as tx:
                if not await places.begin_pooled(
                    tx,
                    sandbox_id,
                    environment_id,
                    host=self._host,
                    fingerprint=spec.fingerprint,
                    pool_max=self._pools[environment_id],
                    running_max=self._running_max,
                ):
                    return
            faults.reach(RECORDED)
            try:
                with anyio.fail_after(PROVISION_SECONDS_MAX):
                    sandbox = await self._backend.provision(replace(spec, id=sandbox_id, generation=1))
                    await sandbox.aclose()
            except (SandboxError, OSError, TimeoutError):
                await self._give_up([sandbox_id])
                raise
            faults.reach(MADE)
            async with self._db.transaction() as tx:
                await places.set_ready(tx, sandbox_id)

    async def _give_up(self, sandbox_ids: list[str]) -> None:
        if not sandbox_ids:
            return
        async with self._db.transaction() as tx:
            given_up = await places.give_up(tx, sandbox_ids, host=self._host)
        for sandbox_id in given_up:
            try:
                await (await self._backend.attach(sandbox_id)).destroy()
            except SandboxGone:
                continue
            except SandboxError as error:
                logger.warning("sandbox %s, made ahead, is left to the collector: %s", sandbox_id, error)
