"""Group commit: the harness's only way to the log.

Every append of a process passes here. The writer takes all that is waiting, up to a bound, locks those sessions that nobody
holds, checks each group's guards, and commits them all in one transaction; each caller waits for its own commit. A failed
guard fails only its own caller, all of its events or none. Sessions that are locked by someone else take a path of their
own with a lock timeout, so one slow API command delays one session. There is one writer: what comes while it commits makes
the next batch larger, and two that split the work were measured to cost half as much processor time again.

A session that this process wrote last, or claimed, needs no lock beforehand: its head is still known, and one statement writes
what is staged on that if nobody changed the row since. Whatever speaks against it, a guard too, is looked at again under the
lock.

When the connection dies around the commit nobody knows whether it happened. The callers get `AppendUncertain`: they forget
what they know of the session and read the log again, which is what a crash would make them do.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import anyio
from anyio.abc import TaskStatus
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from managed_agents.core import faults, limits
from managed_agents.core.errors import TransientError
from managed_agents.db.engine import Database, Tx, connection_lost
from managed_agents.eventlog import append as log
from managed_agents.eventlog import fold
from managed_agents.eventlog.events import NewEvent, QueuedEvent, StoredEvent
from managed_agents.eventlog.known import KnownHeads

logger = logging.getLogger(__name__)

COMMITTED = faults.register("batch.committed", "appends committed, nobody told yet")
_PROGRESS = ("agent.", "user.", "system.")  # a turn that only opens and closes spans goes round in circles
ALONE_AT_ONCE = 2  # appends that wait for one session's lock, each on a connection


class AppendUncertain(TransientError):
    """The append may or may not have happened. Read the log again before writing anything."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Give the session up in the same transaction. `due_in_seconds` parks it until then."""

    due_in_seconds: float | None = None


@dataclass(slots=True)
class Append:
    """One caller's group: guards, events, inbox ids taken up with them, and perhaps the release of the lease.

    `expect_input_seq` and `expect_last_seq` are what the caller decided on: nothing is appended when the session's input or its
    log has moved. `within_budget`: nor when the session's budget is used up at that very position.
    """

    session_id: str
    events: Sequence[NewEvent]
    owner: str
    epoch: int
    expect_input_seq: int | None = None
    expect_last_seq: int | None = None
    within_budget: bool = False
    taken: Sequence[QueuedEvent] = ()
    rest: Rest | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    stored: list[StoredEvent] = field(default_factory=list[StoredEvent])
    # What the session's input was at when it was committed.
    input_seq: int | None = None
    error: Exception | None = None
    broken: bool = False

    @property
    def changes_threads(self) -> bool:
        """Whether any event of the group is folded into a thread row."""
        return any(event.type in fold.THREAD_TYPES or event.usage is not None for event in self.events)

    def stage(self, head: log.Head | None) -> None:
        """Check the guards against the locked row and stage.

        Raises:
            SessionGone, LeaseLost, NewInput, BudgetReached: see `append.py`.
        """
        if head is None or head.deleted:
            raise log.SessionGone
        if head.epoch != self.epoch or head.owner != self.owner:
            raise log.LeaseLost
        if self.expect_input_seq is not None and head.input_seq != self.expect_input_seq:
            raise log.NewInput
        if self.expect_last_seq is not None and head.last_seq != self.expect_last_seq:
            raise log.NewInput
        if self.within_budget and head.at_cap:
            raise log.BudgetReached
        self.stored = head.append(self.events)
        self.input_seq = head.input_seq
        if head.crashes and any(event.type.startswith(_PROGRESS) for event in self.events):
            # Whatever crashed before, this owner came further.
            head.crashes = 0
        head.taken += [event.id for event in self.taken]
        head.inbox_count -= len(self.taken)
        if self.rest is not None:
            self._release(head, self.rest)

    def fits(self, head: log.Head) -> bool:
        """Stage on a head that may be out of date; False when that does not do, for whatever reason the lock will tell."""
        try:
            self.stage(head)
        except Exception:  # noqa: BLE001 - the guards, and bugs in one caller's events: both are told where the row is locked
            return False
        return True

    def _release(self, head: log.Head, rest: Rest) -> None:
        head.owner = None
        head.due_at = None
        head.not_before = None
        head.crashes = 0
        assert self.expect_input_seq is not None, "a resting step names the input it decided on"
        head.handled_seq = self.expect_input_seq
        if rest.due_in_seconds is not None:
            head.due_at = head.at + timedelta(seconds=rest.due_in_seconds)


class Appender:
    """The batcher of one process. `run()` must be alive for `append()` to finish."""

    def __init__(self, db: Database, publish: Callable[[list[StoredEvent]], None]) -> None:
        self._db = db
        self._publish = publish
        self._waiting: deque[Append] = deque()
        self._wake = anyio.Event()
        self._alone = anyio.CapacityLimiter(ALONE_AT_ONCE)
        self._known = KnownHeads()
        self._unanswered: dict[int, Append] = {}
        self._ended = False

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled. However it ends, nobody is left waiting: callers are shielded from cancellation."""
        try:
            async with anyio.create_task_group() as group:
                task_status.started()
                while True:
                    for left in await self._write(await self._next_batch()):
                        group.start_soon(self._write_alone, left)
        finally:
            self._ended = True
            for left in self._unanswered.values():
                self._fail(left, AppendUncertain("the writer ended"))

    def know(self, heads: Iterable[tuple[log.Head, str]]) -> None:
        """Take heads that this process has just written otherwise, by a claim, with the versions of their rows."""
        for head, version in heads:
            self._known.heard(head.at)
            self._known.keep(head, version)

    async def append(self, group: Append) -> list[StoredEvent]:
        """Append `group` and wait for its commit.

        The wait is bounded by the writers' own deadlines: every group they take is answered within them. Cancellation leaves
        the group to be written or not; its events are not known to have happened.

        Raises:
            LeaseLost, NewInput, BudgetReached, SessionGone, TakenAlready: nothing was written.
            AppendUncertain: nobody knows.
        """
        if self._ended:
            raise AppendUncertain("the writer has ended")
        self._waiting.append(group)
        self._unanswered[id(group)] = group
        self._wake.set()
        try:
            await group.done.wait()
        finally:
            del self._unanswered[id(group)]
        if group.error is not None:
            raise group.error
        return group.stored

    async def _next_batch(self) -> list[Append]:
        while not self._waiting:
            self._wake = anyio.Event()
            await self._wake.wait()
        groups: list[Append] = []
        events = 0
        while self._waiting and events < limits.APPEND_BATCH_EVENTS_MAX:
            group = self._waiting.popleft()
            groups.append(group)
            events += len(group.events)
        return groups

    async def _write(self, groups: list[Append]) -> list[Append]:
        """Commit `groups`; returns those that have to be tried alone."""
        try:
            with anyio.fail_after(limits.APPEND_SECONDS_MAX):
                left = await self._commit_known(groups)
                return await self._commit_available(left) if left else []
        except (SQLAlchemyError, OSError, TimeoutError, log.TakenAlready) as error:
            # Whose fault it was is not known: each group that is not answered yet is tried alone.
            logger.warning("batch of %d appends failed, trying each alone: %s", len(groups), type(error).__name__)
            left = [group for group in groups if not group.done.is_set()]
            if not _maybe_committed(error):
                return left
            for group in left:
                self._fail(group, AppendUncertain("the connection was lost around the commit"))
            return []

    async def _commit_known(self, groups: list[Append]) -> list[Append]:
        """Commit the groups that fit the heads known of their sessions, those that are still as known; returns the others."""
        heads: dict[str, tuple[log.Head, str]] = {}
        for session_id in {group.session_id for group in groups}:
            if (found := self._known.take(session_id)) is not None:
                heads[session_id] = found
        if not heads:
            return groups
        changing = {group.session_id for group in groups if group.changes_threads}
        async with self._db.autocommit() as tx:
            # Whoever changes a thread's row changes its session's too, which then has another version.
            bare = {session_id: head for session_id, (head, _) in heads.items() if session_id in changing and not head.threads}
            if bare:
                await log.load_threads(tx, bare)
            for group in groups:
                # The groups of one session stay in order: where one does not fit, all of them go the other way.
                if group.session_id in heads and not group.fits(heads[group.session_id][0]):
                    del heads[group.session_id]
            if not heads:
                return groups
            versions, at = await log.write_known(tx, list(heads.values()))
        if at is not None:
            self._known.heard(at)
        written = [group for group in groups if group.session_id in versions]
        for session_id, version in versions.items():
            self._known.keep(heads[session_id][0], version)
        self._answer(written)
        return [group for group in groups if group.session_id not in versions]

    async def _commit_available(self, groups: list[Append]) -> list[Append]:
        """Commit the groups whose session is free; returns the others."""
        staged: list[Append] = []
        skipped: list[Append] = []
        async with self._db.transaction() as tx:
            heads = await log.lock_available(
                tx,
                sorted({group.session_id for group in groups}),
                threads_of={group.session_id for group in groups if group.changes_threads},
            )
            for group in groups:
                if group.session_id not in heads:
                    skipped.append(group)
                elif self._staged(group, heads[group.session_id]):
                    staged.append(group)
                elif group.broken:
                    # The head is half changed: nothing of that session may be written from it.
                    del heads[group.session_id]
                    skipped += [other for other in staged if other.session_id == group.session_id]
                    staged = [other for other in staged if other.session_id != group.session_id]
            if heads:
                # Not where a lock was waited for: the clock was read before that.
                self._known.heard(max(head.at for head in heads.values()))
            versions = await self._write_heads(tx, heads, staged)
        self._keep(heads, versions)
        self._answer(staged)
        return skipped

    async def _write_alone(self, group: Append) -> None:
        try:
            with anyio.fail_after(limits.APPEND_SECONDS_MAX):
                async with self._alone, self._db.transaction() as tx:
                    head = await log.lock(tx, group.session_id)
                    if not self._staged(group, head):
                        return
                    assert head is not None
                    heads = {head.id: head}
                    versions = await self._write_heads(tx, heads, [group])
        except log.TakenAlready as error:
            self._fail(group, error)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            logger.warning("append to %s failed: %s", group.session_id, error)
            self._fail(group, AppendUncertain(f"the append failed: {type(error).__name__}"))
        else:
            self._keep(heads, versions)
            self._answer([group])

    async def _write_heads(self, tx: Tx, heads: dict[str, log.Head], staged: list[Append]) -> dict[str, str]:
        wanted = {group.session_id for group in staged}
        if not wanted:
            return {}
        return await log.write(tx, [head for head in heads.values() if head.id in wanted])

    def _keep(self, heads: dict[str, log.Head], versions: dict[str, str]) -> None:
        """Know heads whose transaction has committed."""
        for session_id, version in versions.items():
            self._known.keep(heads[session_id], version)

    def _staged(self, group: Append, head: log.Head | None) -> bool:
        try:
            group.stage(head)
        except (log.SessionGone, log.LeaseLost, log.NewInput, log.BudgetReached) as error:
            self._fail(group, error)
            return False
        except Exception as error:  # a bug in one caller's events must not take the others down
            logger.exception("events of %s cannot be folded", group.session_id)
            group.broken = True
            self._fail(group, error)
            return False
        return True

    def _answer(self, groups: list[Append]) -> None:
        faults.reach(COMMITTED)
        self._publish([event for group in groups for event in group.stored])
        for group in groups:
            group.done.set()

    def _fail(self, group: Append, error: Exception) -> None:
        group.error = error
        group.done.set()


def _maybe_committed(error: Exception) -> bool:
    """Whether the transaction may have committed: not without a connection, and a refused statement rolled everything back."""
    if isinstance(error, (log.TakenAlready, PoolTimeout)):
        return False
    return not isinstance(error, DBAPIError) or connection_lost(error)
