"""A worker: claims sessions, runs each in a task of its own, and keeps watch over dead neighbours.

Wake-ups are hints. The doorbell makes it fast; a poll every `POLL_SECONDS` makes it correct: it claims what nobody owns, tells
runners of input they may have missed, gives back sessions that the database says are ours while nothing here runs them, and
stops runners whose lease has gone.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol, cast

import anyio
import orjson
from anyio.abc import TaskGroup
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.core import faults, limits
from managed_agents.core.errors import TransientError
from managed_agents.core.logs import Trouble
from managed_agents.db.engine import Database
from managed_agents.db.listener import WORK_CHANNEL, listen
from managed_agents.eventlog.append import LeaseLost, SessionGone, TakenAlready
from managed_agents.harness import heartbeat, lease
from managed_agents.harness.giving_up import GivingUp
from managed_agents.harness.lease import Claim
from managed_agents.harness.loop import Parts, SessionRunner
from managed_agents.sandbox.backend import StaleEpoch

logger = logging.getLogger(__name__)

CLAIMED = faults.register("worker.claimed", "claim committed, session not read")
DEAD_LOOK_SECONDS = 0.25
CLAIM_BATCH = 100
GAVE_BACK = faults.register("worker.gave_back", "session given back, nobody told")
FREED = faults.register("worker.freed", "sessions of a dead worker freed, nobody told")
_GIVE_BACK = text("UPDATE sessions SET owner = NULL, epoch = epoch + 1 WHERE id = :id AND owner = :worker AND epoch = :epoch")
_RING = text("SELECT pg_notify(:channel, :payload)")


class Runner(Protocol):
    """Runs one claimed session."""

    claim: Claim
    handed_over: bool

    def notify(self) -> None:
        """New input arrived."""
        ...

    def drain(self) -> None:
        """Stop after the step at hand."""
        ...

    async def run(self) -> None:
        """Run to rest."""
        ...


class _Running:
    """A runner and the scope that ends it."""

    def __init__(self, runner: Runner, scope: anyio.CancelScope) -> None:
        self.runner = runner
        self.scope = scope
        self.input_seq = runner.claim.input_seq
        self.missing = 0


class Worker:
    """One worker process's share of the work. `run()` owns everything it starts."""

    def __init__(self, parts: Parts, *, turns_max: int, ttl_seconds: float) -> None:
        self._parts = parts
        self._db: Database = parts.db
        self._turns_max = turns_max
        self._ttl_seconds = ttl_seconds
        self._running: dict[str, _Running] = {}
        self._wake = anyio.Event()
        self._ended = anyio.Event()  # of a runner
        self._draining = False
        # Held while sessions move between "ours in the database" and "run here", so that the poll sees both or none.
        self._ledger = anyio.Lock()

    @property
    def turns(self) -> int:
        """Sessions being run now, for the metrics."""
        return len(self._running)

    async def run(self) -> None:
        """Work until cancelled."""
        await heartbeat.live(self._db.url, host=self._parts.hands.host, ttl_seconds=self._ttl_seconds, work=self._work)

    async def drain(self, *, seconds: float) -> None:
        """Claim nothing more, and let every session go after the step it is at: another worker goes on from its log.

        Returns when all are gone or after the bound. What is left is given up when `run()` is cancelled: calls go on in
        their sandbox and are collected by the next owner, model requests are asked again.
        """
        self._draining = True
        with anyio.move_on_after(seconds):
            async with self._ledger:  # behind a claim under way
                for running in self._running.values():
                    running.runner.drain()
            while self._running:
                await self._ended.wait()

    async def _work(self, worker_id: str) -> None:
        self._running.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(listen, self._db.url, {WORK_CHANNEL: self._heard}, self._connected)
            group.start_soon(self._forever, lambda: self._watch_owned(worker_id), limits.POLL_SECONDS)
            group.start_soon(self._forever, self._free_dead, min(DEAD_LOOK_SECONDS, self._ttl_seconds / 4))
            group.start_soon(self._forever, lambda: self._claim(group, worker_id), 0.0)

    async def _forever(self, look: Callable[[], Awaitable[None]], every_seconds: float) -> None:
        """Supervise one reconciler: a failed look is logged and tried again."""
        trouble = Trouble(logger)
        while True:
            try:
                with anyio.fail_after(limits.DATABASE_STATEMENT_SECONDS):
                    await look()
                trouble.over("the database is back")
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                trouble.report("database trouble: %s: %s", type(error).__name__, error)
                await anyio.sleep(limits.POLL_SECONDS)
            await anyio.sleep(every_seconds)

    # Wake-ups

    def _heard(self, session_ids: list[str]) -> None:
        for session_id in session_ids:
            if (running := self._running.get(session_id)) is not None:
                running.runner.notify()
            else:
                self._wake.set()

    async def _connected(self) -> None:
        self._wake.set()
        for running in self._running.values():
            running.runner.notify()

    async def _claim(self, group: TaskGroup, worker_id: str) -> None:
        with anyio.move_on_after(limits.POLL_SECONDS):
            await self._wake.wait()
        self._wake = anyio.Event()
        while (free := min(CLAIM_BATCH, self._turns_max - len(self._running))) > 0:
            async with self._ledger:
                if self._draining:
                    return
                async with self._db.autocommit() as tx:
                    claims, heads = await lease.claim(tx, worker_id, limit=free)
                self._parts.appender.know(heads)
                if claims:
                    faults.reach(CLAIMED)
                for claim in claims:
                    if (runner := await self._runner(claim, worker_id)) is not None:
                        running = _Running(runner, anyio.CancelScope())
                        self._running[claim.session_id] = running
                        group.start_soon(self._run, running, worker_id)
            if len(claims) < free:
                return

    async def _free_dead(self) -> None:
        async with self._db.autocommit() as tx:
            freed = await lease.free_dead(tx, ttl_seconds=self._ttl_seconds)
        if freed:
            faults.reach(FREED)
            logger.warning("a worker died; %d of its sessions are free", len(freed))
            self._wake.set()

    async def _watch_owned(self, worker_id: str) -> None:
        async with self._ledger:
            before = dict(self._running)
            async with self._db.autocommit() as tx:
                owned = await lease.owned_input(tx, worker_id)
                for session_id, (_, epoch) in owned.items():
                    if session_id not in before:
                        await tx.execute(_GIVE_BACK, {"id": session_id, "worker": worker_id, "epoch": epoch})
                        logger.warning("gave back %s: nothing runs it here", session_id)
        for session_id, running in before.items():
            found = owned.get(session_id)
            if found is None or found[1] != running.runner.claim.epoch:
                # Once may be a runner that has just rested; twice is a lost lease.
                running.missing += 1
                if running.missing > 1:
                    running.scope.cancel()
            elif found[0] != running.input_seq:
                running.input_seq = found[0]
                running.runner.notify()

    # Turns

    async def _runner(self, claim: Claim, worker_id: str) -> Runner | None:
        if claim.crashes >= limits.CRASHES_MAX:
            return GivingUp(self._db, self._parts.appender, claim, worker_id)
        try:
            return SessionRunner(self._parts, claim, worker_id)
        except Exception:  # supervisor: a harness may fail as early as that
            logger.exception("running %s failed", claim.session_id)
            await self._record_failure(claim, worker_id)
            return None

    async def _run(self, running: _Running, worker_id: str) -> None:
        session_id = running.runner.claim.session_id
        try:
            with running.scope:
                await self._run_supervised(running.runner, worker_id)
        finally:
            if self._running.get(session_id) is running:
                del self._running[session_id]
            # Input that came during the last step woke only this runner.
            self._wake.set()
            self._ended.set()
            self._ended = anyio.Event()

    async def _run_supervised(self, runner: Runner, worker_id: str) -> None:
        session_id = runner.claim.session_id
        try:
            await runner.run()
            if runner.handed_over:
                await self._hand_over(runner.claim, worker_id)
        except Exception as error:  # supervisor: one session's failure is its own
            leaves = list(_leaves(error))
            names = ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
            if all(isinstance(leaf, (LeaseLost, SessionGone, StaleEpoch)) for leaf in leaves):
                logger.info("stopped running %s: %s", session_id, names)
            elif all(isinstance(leaf, _EXPECTED) for leaf in leaves):
                # What is still ours is given back by the poll, and claimed again.
                logger.warning("run of %s broke off: %s", session_id, names)
            else:
                logger.exception("running %s failed", session_id)
                await self._record_failure(runner.claim, worker_id)

    async def _hand_over(self, claim: Claim, worker_id: str) -> None:
        async with self._db.autocommit() as tx:
            await tx.execute(_GIVE_BACK, {"id": claim.session_id, "worker": worker_id, "epoch": claim.epoch})
            faults.reach(GAVE_BACK)
            # Only a hint, and a rare one: the others would see it at their next poll.
            await tx.execute(_RING, {"channel": WORK_CHANNEL, "payload": orjson.dumps([claim.session_id]).decode()})

    async def _record_failure(self, claim: Claim, worker_id: str) -> None:
        try:
            with anyio.fail_after(limits.DATABASE_STATEMENT_SECONDS):
                async with self._db.autocommit() as tx:
                    failures = await lease.record_failure(tx, claim, worker_id)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            # The poll gives it back, and the next failure is counted.
            logger.warning("could not record the failure of %s: %s", claim.session_id, type(error).__name__)
            return
        if failures == 0:
            logger.error("%s is left alone until it gets new input: even giving its turn up failed", claim.session_id)


_EXPECTED = (LeaseLost, SessionGone, TakenAlready, TransientError, SQLAlchemyError, OSError, TimeoutError)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in cast(BaseExceptionGroup[BaseException], error).exceptions:
            yield from _leaves(inner)
    else:
        yield error
