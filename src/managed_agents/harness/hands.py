"""The owner's grip on a session's sandbox: bind, provision beside the first model request, call, snapshot, harvest.

The binding is a row, written before anything is created: whoever comes after a crash knows what may exist. A sandbox that
is gone makes the call at hand ambiguous, whether it had started or not, and the model is told so; the next call gets another
one, restored from the last snapshot, and the model is told what may be older. One that had been stopped with a snapshot is
replaced without a word. Nothing here decides anything about the turn.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import anyio
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.blobstore.store import BlobStore, BlobTooLarge
from managed_agents.core import faults, limits
from managed_agents.core.ids import SessionId, WorkspaceId
from managed_agents.db.engine import Database
from managed_agents.harness import outputs
from managed_agents.harness.clone_cache import KEEPING_AT_ONCE, CloneCache
from managed_agents.harness.cloning import Repositories
from managed_agents.harness.lease import Claim
from managed_agents.harness.mounting import Mounts, reason
from managed_agents.harness.provisioning import PROVISION_SECONDS_MAX, NoPlace, Provisioning
from managed_agents.harness.turn import ToolCall
from managed_agents.resources.sessions import bindings, snapshots
from managed_agents.resources.sessions.bindings import Binding, Upload
from managed_agents.sandbox.backend import (
    Call,
    CallUnknown,
    Outcome,
    PackagesFailed,
    Sandbox,
    SandboxBackend,
    SandboxError,
    SandboxGone,
    SandboxSpec,
    SandboxUnreachable,
    StaleEpoch,
)

logger = logging.getLogger(__name__)

ATTACHED = faults.register("hands.attached", "attached to a sandbox that was there, nothing called")
BEFORE_CALL = faults.register("hands.before_call", "sandbox open, call not sent")
ACKNOWLEDGED = faults.register("hands.acknowledged", "outcome in the log, the sandbox has forgotten it")
CANCELLED = faults.register("hands.cancelled", "running call ended by an interrupt, not in the log")
CRASHED = "Tool execution was interrupted by a crash. Please retry."  # observed
PROVISIONS_AT_ONCE = 2  # creating containers is the engine's slowest work; more at once only makes each slower
CANCEL_SECONDS_MAX = 10.0
ACKNOWLEDGE_SECONDS_MAX = 5.0
STOPPING_SECONDS_MAX = 15.0  # for the collector to finish; then it has died
STOPPING_LOOK_SECONDS = 0.1
WAIT_LOOK_SECONDS = 0.25
WAIT_TOLD_SECONDS = 1.0
WAITING = "Waiting for a place: {0} sandboxes may run on this host at once, and all are in use. The call runs when one is free."
NO_PLACE = "all {0} sandboxes that may run on its host at once stayed in use for {1} s"


@dataclass(frozen=True, slots=True)
class Hands:
    """What every session's hands of a worker share."""

    db: Database
    backend: SandboxBackend
    blobs: BlobStore
    spec: Callable[[str, int, str | None, str], SandboxSpec]  # sandbox id, generation, session and environment → what to make
    host: str
    image: str  # to which an environment's packages are added
    snapshot_seconds: float = 600.0  # between snapshots while a session works
    running_max: int = 0  # sandboxes that run on this host at once; 0 is no bound
    wait_seconds: float = 600.0  # how long a call waits for a place among them
    clones_bytes_max: int = 10 * 1024**3  # cached clones of a workspace; 0 is none
    provisions: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(PROVISIONS_AT_ONCE))
    keeping: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(KEEPING_AT_ONCE))

    def of_session(self, claim: Claim) -> "SessionHands":
        """The hands of one claimed session; nothing is created yet."""
        return SessionHands(self, claim)


class SessionHands:
    """One session's sandbox, as its owner uses it. `on_wait` is told when a call has to wait for a place."""

    def __init__(self, hands: Hands, claim: Claim) -> None:
        self._hands = hands
        self._session_id = SessionId(claim.session_id)
        self._workspace_id = WorkspaceId(claim.workspace_id)
        self._epoch = claim.epoch
        self._binding: Binding | None = None
        self._sandbox: Sandbox | None = None
        self._handles: list[Sandbox] = []  # all that may hold connections, the one that is gone too
        self._opening = anyio.Lock()
        cache = CloneCache(hands.db, hands.blobs, hands.clones_bytes_max, hands.keeping)
        self.repositories = Repositories(
            hands.db,
            cache,
            self._workspace_id,
            self._session_id,
            claim.epoch,
            has_gateway="network" in hands.backend.capabilities,
        )
        self._outputs = outputs.Outputs(hands.db, hands.blobs, self._workspace_id, self._session_id)
        self._mounts = Mounts(hands.db, hands.blobs, self._session_id)
        self._provisioning = Provisioning(hands, self._session_id, claim.epoch, self._mounts)
        self._told: dict[str, str] = {}  # of outcomes with a note: call → sandbox
        self._used = False
        self.on_wait: Callable[[str], Awaitable[None]] | None = None

    async def uploads(self, as_of: int) -> list[Upload]:
        """Files mounted into the session, read again when `as_of`, the session's `input_seq`, has moved."""
        return await self._mounts.wanted(as_of)

    async def prepare(self) -> None:
        """Have the sandbox ready before the first call needs it. Run beside the model request; failing is left to the call.

        Cancelling gives up the place in the queue; what has begun is finished.
        """
        try:
            await self.repositories.clone(await self._open())
        except SandboxError as error:
            logger.warning("sandbox of %s is not ready yet: %s", self._session_id, error)

    async def execute(self, call: ToolCall) -> Outcome:
        """Run `call`, or collect what a former owner started: nothing runs twice while the sandbox lives.

        Trouble with the sandbox is an error outcome, told to the model.

        Raises:
            StaleEpoch: another worker owns the session.
        """
        sandbox: Sandbox | None = None
        try:
            sandbox = await self._open(calling=True)
            unmounted = await self._mount(sandbox)
            await self.repositories.clone(sandbox)
            await self._use()
            faults.reach(BEFORE_CALL)
            asked = Call(call.event_id, self._epoch, call.name, call.input, limits.TOOL_CALL_SECONDS_MAX)
            outcome = self._noted(call.event_id, await self._asked(sandbox, asked))
            return outcome if unmounted is None else _with(unmounted, outcome)
        except StaleEpoch:
            raise
        except PackagesFailed as error:
            return _error(str(error))
        except SandboxGone as error:
            logger.warning("sandbox of %s is gone: %s", self._session_id, error)
            await self._forget(sandbox)
            return _error(CRASHED)
        except SandboxError as error:
            return _error(f"The sandbox could not run this call: {error}. Please retry.")

    async def _asked(self, sandbox: Sandbox, call: Call) -> Outcome:
        try:
            return await sandbox.execute(call)
        except SandboxUnreachable as error:
            # It may have run, and the sandbox may be there again when the next call looks for it.
            logger.warning("sandbox of %s cannot be reached: %s", self._session_id, error)
            async with self._opening:
                if self._sandbox is sandbox:
                    self._sandbox = None
            return _error(CRASHED)

    async def _use(self) -> None:
        """Record, before the first call, that from now on the sandbox holds what could be lost."""
        self._used = True
        if self._binding is not None and not self._binding.used:
            async with self._hands.db.autocommit() as tx:
                await bindings.touch(tx, self._binding.sandbox_id)
            self._binding = replace(self._binding, used=True)

    def _noted(self, call_id: str, outcome: Outcome) -> Outcome:
        """Tell the model what became of the sandbox before, with each outcome of this one until it is in the log."""
        if self._binding is None or self._binding.note is None:
            return outcome
        self._told[call_id] = self._binding.sandbox_id
        return _with(self._binding.note, outcome)

    async def keep(self, path: str, text: str) -> bool:
        """Write a file for the session's commands to read; False when that failed, which is not the call's failure."""
        try:
            sandbox = await self._open()
            await self._use()
            await sandbox.put(path, text.encode(errors="replace"), "agent")
        except StaleEpoch:
            raise
        except SandboxError as error:
            logger.warning("output for %s not kept: %s", self._session_id, error)
            return False
        return True

    async def acknowledge(self, tool_use_id: str) -> None:
        """Let the sandbox forget an outcome that is in the log now. Best effort: it keeps a bounded number anyway.

        Nobody waits for it, and the end of the run lets it finish within a bound.
        """
        with anyio.move_on_after(ACKNOWLEDGE_SECONDS_MAX, shield=True):
            await self._acknowledge(tool_use_id)

    async def _acknowledge(self, tool_use_id: str) -> None:
        try:
            told, binding = self._told.pop(tool_use_id, None), self._binding
            if told is not None and binding is not None and binding.note is not None and binding.sandbox_id == told:
                async with self._hands.db.autocommit() as tx:
                    await bindings.told(tx, binding.sandbox_id)
                if self._binding is binding:
                    self._binding = replace(binding, note=None)
            if self._sandbox is not None:
                await self._sandbox.ack(tool_use_id)
                faults.reach(ACKNOWLEDGED)
        except (SandboxError, SQLAlchemyError, OSError) as error:
            logger.warning("outcome of %s not acknowledged: %s", tool_use_id, type(error).__name__)

    async def cancel(self, tool_use_ids: Sequence[str]) -> None:
        """End running calls, a former owner's too, and forget them; returns when they have ended, or after a bound."""
        for tool_use_id in tool_use_ids:
            with anyio.move_on_after(CANCEL_SECONDS_MAX):
                try:
                    if (sandbox := await self._existing()) is None:
                        return
                    await sandbox.cancel(tool_use_id, self._epoch)
                    faults.reach(CANCELLED)
                    await sandbox.ack(tool_use_id)
                except CallUnknown:
                    continue
                except SandboxError as error:
                    logger.warning("call %s not cancelled: %s", tool_use_id, error)

    async def aclose(self) -> None:
        """Drop the connections to the sandbox; it goes on. From now it counts as unused."""
        for handle in self._handles:
            await handle.aclose()
        self._handles.clear()
        if self._used and self._binding is not None:
            try:
                async with self._hands.db.autocommit() as tx:
                    await bindings.touch(tx, self._binding.sandbox_id)
            except (SQLAlchemyError, OSError) as error:
                logger.warning("end of use of %s not recorded: %s", self._session_id, type(error).__name__)

    # Snapshots

    async def keep_safe(self) -> None:
        """Snapshot the sandbox every `snapshot_seconds` while it is used. Runs until cancelled; failing waits for the next."""
        while True:
            await anyio.sleep(self._hands.snapshot_seconds)
            if (sandbox := self._sandbox) is None or not self._used:
                continue
            try:
                with anyio.fail_after(limits.SNAPSHOT_SECONDS_MAX):
                    await snapshots.take(self._hands.db, self._hands.blobs, sandbox)
                # What runs now is newer than what was taken.
                async with self._hands.db.autocommit() as tx:
                    await bindings.touch(tx, sandbox.id)
            except (SandboxError, BlobTooLarge, OSError, TimeoutError, SQLAlchemyError) as error:
                logger.warning("no snapshot of %s: %s: %s", self._session_id, type(error).__name__, error)

    # Outputs

    async def collect_outputs(self) -> None:
        """Make files of outputs while the session works, soon after they were written. Runs until cancelled."""
        while True:
            await anyio.sleep(outputs.LOOK_SECONDS)
            if (sandbox := self._sandbox) is None or not self._used:
                continue
            try:
                with anyio.fail_after(outputs.HARVEST_SECONDS_MAX):
                    await self._outputs.collect(sandbox, settled=True)
            except (SandboxError, OSError, TimeoutError, SQLAlchemyError) as error:
                logger.warning("outputs of %s not collected yet: %s: %s", self._session_id, type(error).__name__, error)

    async def harvest(self) -> None:
        """Make files of what is in the outputs directory, once per content. Best effort within a bound.

        Also for calls of a former owner, who may have died before it came to this.
        """
        with anyio.move_on_after(outputs.HARVEST_SECONDS_MAX) as scope:
            try:
                if (sandbox := await self._existing()) is not None:
                    await self._outputs.collect(sandbox, settled=False)
            except (SandboxError, OSError, SQLAlchemyError) as error:
                logger.warning("outputs of %s not collected: %s: %s", self._session_id, type(error).__name__, error)
        if scope.cancelled_caught:
            logger.warning("outputs of %s not collected: it took too long", self._session_id)

    # Binding

    async def _open(self, *, calling: bool = False) -> Sandbox:
        """The sandbox, once there is a place for it; `calling`: a call waits, and whoever watches is told why."""
        begun, told = anyio.current_time(), not calling
        while True:
            try:
                async with self._opening:
                    if self._sandbox is None:
                        self._sandbox = await self._attach(wake=True) or await self._provisioned()
                    return self._sandbox
            except NoPlace:
                waited = anyio.current_time() - begun
            if waited > self._hands.wait_seconds:
                raise SandboxError(NO_PLACE.format(self._hands.running_max, f"{waited:.0f}"))
            if not told and waited >= WAIT_TOLD_SECONDS:
                told = True
                logger.info("session %s waits for a place for its sandbox", self._session_id)
                if self.on_wait is not None:
                    await self.on_wait(WAITING.format(self._hands.running_max))
            # Not under the lock: an interrupt or the end of the turn must not wait for a place.
            await anyio.sleep(WAIT_LOOK_SECONDS)

    async def _existing(self) -> Sandbox | None:
        """The sandbox, when there is one that may have got a call."""
        async with self._opening:
            if self._sandbox is None:
                self._sandbox = await self._attach(wake=False)
            return self._sandbox

    async def _forget(self, gone: Sandbox | None) -> None:
        """Give up the sandbox that is gone, None where there was none to attach to; not one that another call has made since."""
        async with self._opening:
            if self._sandbox is not gone:
                return
            self._sandbox = None
            if self._binding is not None:
                async with self._hands.db.transaction() as tx:
                    await bindings.set_destroyed(tx, self._binding.sandbox_id)
                self._binding = None

    async def _attach(self, *, wake: bool) -> Sandbox | None:
        """The session's sandbox, when there is one that may have got a call; `wake` starts one that was stopped."""
        found = await self._current(wake)
        if found is None:
            return None
        # None of a stopped one's calls can be running, and its files are in the snapshot: losing it is no news.
        stopped = found.state == "stopped"
        if found.host != self._hands.host:
            self._binding = None if stopped else found
            if stopped:
                return None
            raise SandboxGone(f"it was on host {found.host}")
        try:
            with anyio.fail_after(PROVISION_SECONDS_MAX):
                sandbox = await self._hands.backend.attach(found.sandbox_id)
        except SandboxGone:
            self._binding = None if stopped else found
            if stopped:
                return None
            raise
        except TimeoutError as error:
            raise SandboxError("attaching took too long") from error
        except OSError as error:
            raise SandboxError(f"it could not be started again ({reason(error)})") from error
        self._handles.append(sandbox)
        faults.reach(ATTACHED)
        self._binding = found
        self._mounts.found(found.mounts)
        return sandbox

    async def _current(self, wake: bool) -> Binding | None:
        """The binding to attach to, made ours: nobody stops it from now on. Waits while it is being stopped."""
        waited = 0.0
        while True:
            async with self._hands.db.transaction() as tx:
                found = await bindings.current(tx, self._session_id)
                # A `provisioning` one never got a call: it is replaced, and the collector destroys what there is of it.
                if found is None or found.state == "provisioning" or (found.state == "stopped" and not wake):
                    return None
                if found.host != self._hands.host:
                    return found
                placed = found.state != "stopped" or await self._provisioning.enter(tx)
                if placed and await bindings.take(tx, found.sandbox_id, force=waited >= STOPPING_SECONDS_MAX):
                    return found
            if not placed:
                raise NoPlace
            await anyio.sleep(STOPPING_LOOK_SECONDS)
            waited += STOPPING_LOOK_SECONDS

    async def _provisioned(self) -> Sandbox:
        self._binding, sandbox = await self._provisioning.in_turn()
        self._handles.append(sandbox)
        return sandbox

    async def _mount(self, sandbox: Sandbox) -> str | None:
        """Bring the files in the sandbox in line with the session's resources, which may have changed since it was made.

        Returns what the model is to be told of it: a full disk, say, must not keep it from making room.
        """
        async with self._opening:
            if self._binding is None or self._mounts.complete:
                return None
            failed = await self._mounts.bring_in_line(sandbox)
            async with self._hands.db.transaction() as tx:
                await bindings.set_mounts(tx, self._binding.sandbox_id, self._mounts.present)
            return failed


def _with(note: str, outcome: Outcome) -> Outcome:
    """The outcome behind a line for the model."""
    content = list(outcome.content)
    if content[0]["type"] == "text":
        content[0] = {**content[0], "text": f"{note}\n{content[0]['text']}"}
    else:
        content.insert(0, {"type": "text", "text": note})
    return Outcome(content, outcome.is_error, outcome.spill_path)


def _error(text: str) -> Outcome:
    return Outcome([{"type": "text", "text": text}], is_error=True)
