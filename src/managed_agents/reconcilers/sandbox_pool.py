"""Keeps sandboxes of some environments ready on this host, for the first call of a session not to wait for a container.

One made ahead is like any other of its environment, and holds nothing of anybody: what belongs to a session is put into it when
it is adopted, and nobody gets it after that. It is recorded before it is made, so a crash leaves nothing unseen. What is no
longer wanted is taken out of the records before it is destroyed; race: a session adopts it in that moment, which is taking it
out of the records too, so only one of them has it. A pool yields: it is not filled while sessions wait for a place, and gives up
what it has.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import anyio

from managed_agents.core import faults, ids
from managed_agents.db.engine import Database
from managed_agents.resources.sessions import bindings, places
from managed_agents.sandbox.backend import SandboxBackend, SandboxError, SandboxGone, SandboxSpec

logger = logging.getLogger(__name__)

RECORDED = faults.register("pool.recorded", "sandbox recorded to be made ahead, not created")
MADE = faults.register("pool.made", "sandbox made ahead, not recorded as ready")
READY_SECONDS_MAX = 3600.0  # then the image may have been replaced
MAKING_SECONDS_MAX = 180.0  # whoever makes one for longer has died
PROVISION_SECONDS_MAX = 120.0


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

    async def look(self) -> None:
        """Look once. Safe to repeat, and in several processes of the host at once."""
        async with self._db.transaction() as tx:
            await places.expire(tx, host=self._host, ready_seconds=READY_SECONDS_MAX, making_seconds=MAKING_SECONDS_MAX)
            wait = await places.waiting(tx, host=self._host) if self._running_max else 0
            packages = await bindings.packages_of_environments(tx, list(self._pools)) if self._pools else {}
            there = await places.pooled(tx, host=self._host)
        wanted: dict[str, SandboxSpec] = {}
        for environment_id, names in packages.items():
            try:
                image = await self._backend.prepare(self._image, names)
                wanted[environment_id] = replace(self._spec("", 0, None, environment_id), image=image)
            except SandboxError as error:
                logger.warning("no sandboxes ahead for %s: %s", environment_id, error)
        unwanted = [
            each.id
            for each in there
            if each.environment_id not in wanted or each.fingerprint != wanted[each.environment_id].fingerprint
        ]
        pressed = [each.id for each in there if each.ready and each.id not in unwanted][:wait]
        await self._give_up([*unwanted, *pressed])
        for environment_id, spec in wanted.items():
            await self._fill(environment_id, spec)

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
