"""Makes a session's sandbox: takes a place, binds it, has it made, restores the last snapshot, mounts files.

The binding is committed before anything is created. Whatever fails afterwards gives the place back. A snapshot that cannot be
restored must not keep a session from ever having a sandbox again: then a fresh one is made, and its note says what is gone.
"""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.blobstore.store import BlobMissing
from managed_agents.core import faults, limits
from managed_agents.core.ids import SessionId
from managed_agents.db.engine import Tx
from managed_agents.harness.mounting import Mounts, reason
from managed_agents.resources.sessions import bindings, places, repositories, snapshots
from managed_agents.resources.sessions.bindings import Binding
from managed_agents.sandbox.backend import (
    BadArchive,
    LimitHit,
    PackagesFailed,
    Sandbox,
    SandboxError,
    SandboxSpec,
    SandboxUnreachable,
    StaleEpoch,
)

if TYPE_CHECKING:
    from managed_agents.harness.hands import Hands

logger = logging.getLogger(__name__)

BOUND = faults.register("hands.bound", "sandbox bound in the database, not created")
CREATED = faults.register("hands.created", "sandbox created, not recorded as live")
RESTORED = faults.register("hands.restored", "snapshot unpacked, sandbox not recorded as live")
RECORDED = faults.register("hands.recorded", "sandbox recorded as live, nothing called")
PROVISION_SECONDS_MAX = 120.0
GIVE_UP_SECONDS_MAX = 10.0
RESTORES_MAX = 2  # that failed for no known reason; the next would, too


class NoPlace(Exception):
    """As many sandboxes run on this host as may; this session is in the queue."""


class Unrestorable(SandboxError):
    """The session's snapshot cannot be restored; trying again would not help."""


class Provisioning:
    """Makes sandboxes for one session, as its owner. Used under the lock that guards the sandbox's binding."""

    def __init__(self, hands: "Hands", session_id: SessionId, epoch: int, mounts: Mounts) -> None:
        self._hands = hands
        self._session_id, self._epoch = session_id, epoch
        self._mounts = mounts
        self._unprepared: PackagesFailed | None = None
        self._restores_failed = 0

    async def enter(self, tx: Tx) -> bool:
        """Take a place among those that may run on this host; False puts the session into the queue. Commit in either case."""
        return await places.enter(tx, self._session_id, host=self._hands.host, running_max=self._hands.running_max)

    async def in_turn(self) -> tuple[Binding, Sandbox]:
        """Make a sandbox, when this process is not making too many already. Cancelling waits for one that was begun.

        Raises: NoPlace, StaleEpoch, SandboxError.
        """
        spec = await self._spec()
        async with self._hands.provisions:
            made: tuple[Binding, Sandbox] | None = None
            with anyio.CancelScope(shield=True):
                try:
                    made = await self._provision(spec, fresh=False)
                except Unrestorable as error:
                    logger.error("snapshot of %s cannot be restored, a fresh sandbox is made: %s", self._session_id, error)
                    made = await self._provision(spec, fresh=True)
            assert made is not None
            return made

    async def _spec(self) -> SandboxSpec:
        """What to make, its image ready. Packages that could not be installed are not tried again in the same turn."""
        if self._unprepared is not None:
            raise self._unprepared
        async with self._hands.db.autocommit() as tx:
            environment_id, packages = await bindings.packages(tx, self._session_id)
        try:
            image = await self._hands.backend.prepare(self._hands.image, packages)
            return replace(self._hands.spec("", 0, self._session_id, environment_id), image=image)
        except PackagesFailed as error:
            self._unprepared = error
            raise
        except OSError as error:
            raise SandboxError(f"its image could not be prepared ({reason(error)})") from error

    async def _provision(self, spec: SandboxSpec, *, fresh: bool) -> tuple[Binding, Sandbox]:
        binding = snapshot = None
        async with self._hands.db.transaction() as tx:
            if placed := await self.enter(tx):
                host, like = self._hands.host, spec.fingerprint
                binding = await bindings.bind(tx, self._session_id, epoch=self._epoch, host=host, fingerprint=like, fresh=fresh)
                if binding is None:
                    raise StaleEpoch("the session belongs to another worker")
                snapshot = None if fresh else await snapshots.latest(tx, self._session_id)
        if not placed or binding is None:
            raise NoPlace
        faults.reach(BOUND)
        try:
            if binding.networking["type"] == "limited" and "network" not in self._hands.backend.capabilities:
                raise SandboxError("the environment's networking is limited, which this server's sandboxes cannot enforce")
            return binding, await self._made(replace(spec, id=binding.sandbox_id, generation=binding.generation), snapshot)
        except SandboxError:
            await self._give_up(binding)
            raise

    async def _made(self, spec: SandboxSpec, snapshot: snapshots.Snapshot | None) -> Sandbox:
        try:
            with anyio.fail_after(PROVISION_SECONDS_MAX):
                sandbox = await self._hands.backend.provision(spec)
        except (OSError, TimeoutError) as error:
            raise SandboxError(f"it could not be started ({reason(error)})") from error
        try:
            if snapshot is not None:
                await self._restore(sandbox, snapshot)
            self._mounts.found({})
            await self._mounts.bring_in_line(sandbox)  # what is missing is told with the first call
        except SandboxError:
            await sandbox.aclose()
            raise
        faults.reach(CREATED)
        async with self._hands.db.transaction() as tx:
            await bindings.set_mounts(tx, spec.id, self._mounts.present)
            if snapshot is not None:
                await repositories.inherit_states(tx, spec.id, snapshot.generation)
            await bindings.set_live(tx, spec.id)
        faults.reach(RECORDED)
        return sandbox

    async def _restore(self, sandbox: Sandbox, snapshot: snapshots.Snapshot) -> None:
        """Raises: Unrestorable, SandboxError."""
        try:
            with anyio.fail_after(limits.RESTORE_SECONDS_MAX):
                await sandbox.restore(self._hands.blobs.open(snapshot.blob))
        except (BadArchive, BlobMissing) as error:
            async with self._hands.db.transaction() as tx:
                await snapshots.drop(tx, self._session_id, snapshot.blob)
            raise Unrestorable(str(error)) from error
        except LimitHit as error:
            # The archive is fine, and kept until the next one takes its place: the operator may make the disks larger again.
            raise Unrestorable(str(error)) from error
        except (SandboxUnreachable, StaleEpoch):
            raise
        except (SandboxError, TimeoutError) as error:
            self._restores_failed += 1
            if self._restores_failed >= RESTORES_MAX:
                raise Unrestorable(reason(error)) from error
            raise SandboxError(f"its snapshot could not be restored ({reason(error)})") from error
        except OSError as error:
            # The blob store does not answer: nothing is known of the snapshot.
            raise SandboxError(f"its snapshot could not be read ({reason(error)})") from error
        faults.reach(RESTORED)

    async def _give_up(self, binding: Binding) -> None:
        """Give back the place of a sandbox that could not be made; the collector destroys what there is of it. Best effort."""
        with anyio.move_on_after(GIVE_UP_SECONDS_MAX):
            try:
                async with self._hands.db.transaction() as tx:
                    await bindings.set_destroyed(tx, binding.sandbox_id)
            except (SQLAlchemyError, OSError) as error:
                # The collector does it once nobody works on the session.
                logger.warning("sandbox of %s not given up: %s", self._session_id, type(error).__name__)
