"""Counts the requests of one process against budgets that all processes share.

A budget belongs to an organisation or a workspace and to a kind of request. A process takes blocks out of it ahead of need
and counts on its own in between, so a request normally costs no look at the database; and a budget that is used up is asked
again only once a second. Invariant: never more requests than the limit in any minute, over all processes (`window.py`).
Blocks are small against the limit and given back unspent, so little is refused too early.

Race: a process that dies keeps its blocks from the others until their minute is over. A block that arrives late is
spendable only for what is left of its time, counted from before it was asked for.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

import anyio
from sqlalchemy import bindparam, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.core import clock as wall
from managed_agents.core import limits
from managed_agents.core.errors import RateLimited, TransientError
from managed_agents.db.engine import Database
from managed_agents.resources.rate_limits.tables import RateBudgetRow
from managed_agents.resources.rate_limits.window import Charges, Grant, take
from managed_agents.web.actor import Actor, RateKind
from managed_agents.web.state import Admission

log = logging.getLogger(__name__)

BLOCK_SHARE = 50  # a process holds at most this fraction of a limit: three idle ones keep 6 % from a busy fourth
AHEAD_SECONDS = 0.5  # a block that ends sooner is replaced before it does
ASK_AGAIN_SECONDS = 1.0  # a budget that was used up: others may have given back
BUDGETS_MAX = 10_000
ROUNDS_MAX = 100  # of a request whose block others took before it woke up
RETRY_SECONDS = 0.5
MINUTE_SECONDS = 60.0

Key = tuple[str, str]  # whose budget, which kind


@dataclass(eq=False)
class _Block:
    slot: int
    count: int
    ends_at: float


@dataclass
class _Budget:
    """One budget as this process sees it. Instants are of the monotonic clock."""

    key: Key
    limit: int
    blocks: list[_Block] = field(default_factory=list[_Block])
    returned: dict[int, int] = field(default_factory=dict[int, int])
    waiting: int = 0
    wanted: bool = False
    closed_until: float = 0.0
    frees_at: float = 0.0
    pool: int = 0  # what was left for everybody when this process last looked
    reset_at: datetime = field(default_factory=wall.now)
    answered: anyio.Event = field(default_factory=anyio.Event)
    failed: bool = False

    @property
    def block(self) -> int:
        return max(1, self.limit // BLOCK_SHARE)

    def drop_ended(self, now: float) -> None:
        """Set aside what was not spent in time, to be given back."""
        for block in [block for block in self.blocks if block.ends_at <= now]:
            self.blocks.remove(block)
            self.returned[block.slot] = self.returned.get(block.slot, 0) + block.count

    def held(self, until: float) -> int:
        """Return how many requests may be made without asking, and still at `until`."""
        return sum(block.count for block in self.blocks if block.ends_at > until)

    def spend(self, now: float) -> _Block | None:
        """Take one request from the block that ends first."""
        self.drop_ended(now)
        if not self.blocks:
            return None
        first = min(self.blocks, key=lambda block: block.ends_at)
        first.count -= 1
        if first.count == 0:
            self.blocks.remove(first)
        return first

    def unspend(self, block: _Block) -> None:
        """Take `spend` back."""
        if block in self.blocks:
            block.count += 1
        else:  # it was used up, or has ended and the rest of it was set aside
            self.blocks.append(_Block(block.slot, 1, block.ends_at))


class Limiter:
    """The limiter of one process; `run` keeps it supplied."""

    def __init__(
        self, db: Database, organization_limits: Mapping[RateKind, int], *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._limits = dict(organization_limits)
        self._db = db
        self._clock = clock
        self._budgets: OrderedDict[Key, _Budget] = OrderedDict()
        self._wake = anyio.Event()
        self.looks = 0  # how often the database was asked

    async def admit(self, actor: Actor, kind: RateKind) -> Admission:
        """Count one request.

        Raises:
            RateLimited: there is no budget left for it.
            TransientError: the database did not answer in time.
        """
        limit = self._limits[kind]
        budgets = [self._budget(actor.organization_id, kind, limit)]
        own = actor.own_limit(kind)
        if own is not None and own < limit:  # spec: the lower of the two is enforced
            budgets.insert(0, self._budget(actor.workspace_id, kind, own))
        spent: list[tuple[_Budget, _Block]] = []
        try:
            for budget in budgets:
                block = budget.spend(self._clock()) or await self._wait(budget)
                spent.append((budget, block))
                self._look_ahead(budget)
        except (RateLimited, TransientError):
            for budget, block in spent:
                budget.unspend(block)
            raise
        return self._admission(budgets[0])

    async def run(self) -> None:
        """Ask for blocks and give back what was not spent, until cancelled."""
        while True:
            with anyio.move_on_after(self._seconds_to_next_end()):
                await self._wake.wait()
            self._wake = anyio.Event()
            now = self._clock()
            for budget in self._budgets.values():
                budget.drop_ended(now)
            due = [budget for budget in self._budgets.values() if budget.wanted or budget.returned]
            try:
                with anyio.fail_after(limits.RATE_LIMIT_WAIT_SECONDS):
                    await self._ask(due)
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                log.warning("rate limit budgets are out of reach", extra={"cause": repr(error)})
                for budget in due:
                    budget.failed = True
                    _answer(budget)
                await anyio.sleep(RETRY_SECONDS)

    def _budget(self, subject_id: str, kind: RateKind, limit: int) -> _Budget:
        key = (subject_id, kind.value)
        budget = self._budgets.get(key)
        if budget is None:
            budget = self._budgets[key] = _Budget(key, limit)
            if len(self._budgets) > BUDGETS_MAX:
                self._forget_one()
        budget.limit = limit
        self._budgets.move_to_end(key)
        return budget

    def _forget_one(self) -> None:
        """Drop the budget that was not used for longest; its blocks stay charged until their minute is over."""
        for key, budget in self._budgets.items():
            if not budget.waiting:
                del self._budgets[key]
                return

    def _look_ahead(self, budget: _Budget) -> None:
        now = self._clock()
        if budget.held(now + AHEAD_SECONDS) <= budget.block // 2 and budget.closed_until <= now:
            self._want(budget)

    def _want(self, budget: _Budget) -> None:
        if not budget.wanted:
            budget.wanted = True
            self._wake.set()

    async def _wait(self, budget: _Budget) -> _Block:
        budget.waiting += 1
        try:
            with anyio.fail_after(limits.RATE_LIMIT_WAIT_SECONDS):
                for _ in range(ROUNDS_MAX):
                    now = self._clock()
                    if (block := budget.spend(now)) is not None:
                        return block
                    if budget.closed_until > now:
                        break
                    budget.failed = False
                    self._want(budget)
                    await budget.answered.wait()
                    if budget.failed:
                        raise TransientError("rate limit budgets are out of reach")
        except TimeoutError as error:
            raise TransientError("rate limit budgets are out of reach") from error
        finally:
            budget.waiting -= 1
        raise self._refusal(budget)

    async def _ask(self, due: Sequence[_Budget]) -> None:
        """Give back and take out, for all `due` in one transaction. What is asked for is settled before the first await."""
        if not due:
            return
        now = self._clock()
        asked = {
            budget.key: max(0, budget.block - budget.held(now + AHEAD_SECONDS)) + budget.waiting if budget.wanted else 0
            for budget in due
        }
        returned = {budget.key: budget.returned for budget in due}
        for budget in due:
            budget.wanted, budget.returned = False, {}
        self.looks += 1
        limit_of = {budget.key: budget.limit for budget in due}
        grants = await take_out(self._db, asked, returned, limit_of)
        for budget in due:
            self._granted(budget, grants[budget.key], asked[budget.key], now)

    def _granted(self, budget: _Budget, grant: Grant, asked: int, sent_at: float) -> None:
        if grant.count:
            budget.blocks.append(_Block(grant.slot, grant.count, sent_at + grant.seconds))
        budget.pool = grant.remaining
        budget.reset_at = wall.now() + timedelta(seconds=grant.all_free_seconds)
        used_up = asked > 0 and grant.count == 0
        budget.frees_at = sent_at + (MINUTE_SECONDS if budget.limit == 0 else grant.next_free_seconds)
        budget.closed_until = sent_at + min(ASK_AGAIN_SECONDS, max(grant.next_free_seconds, 0.05)) if used_up else 0.0
        _answer(budget)

    def _seconds_to_next_end(self) -> float:
        ends = [block.ends_at for budget in self._budgets.values() for block in budget.blocks]
        return max(0.01, min(ends) - self._clock()) if ends else math.inf

    def _admission(self, budget: _Budget) -> Admission:
        return Admission(budget.limit, min(budget.limit, budget.pool + budget.held(self._clock())), budget.reset_at)

    def _refusal(self, budget: _Budget) -> RateLimited:
        subject = "workspace" if budget.key[0].startswith("wrkspc_") else "organization"
        seconds = max(1, math.ceil(budget.frees_at - self._clock()))
        headers = Admission(budget.limit, 0, budget.reset_at).headers() | {"retry-after": str(seconds)}
        kind = budget.key[1]
        return RateLimited(
            f"This request would exceed the rate limit of your {subject}: {budget.limit} {kind} requests per minute",
            headers=headers,
        )


def _answer(budget: _Budget) -> None:
    budget.answered.set()
    budget.answered = anyio.Event()


async def take_out(
    db: Database, asked: dict[Key, int], returned: dict[Key, dict[int, int]], limit_of: dict[Key, int]
) -> dict[Key, Grant]:
    """Give back and take out of the stored budgets, all under their rows' locks, in key order."""
    keys = sorted(asked)
    row_key = tuple_(RateBudgetRow.subject_id, RateBudgetRow.kind)
    # The statement's clock is read before its locks are there: older than true, so blocks end early rather than late.
    locked = (
        select(
            RateBudgetRow.subject_id,
            RateBudgetRow.kind,
            RateBudgetRow.newest_slot,
            RateBudgetRow.charges,
            func.extract("epoch", func.clock_timestamp()),
        )
        .where(row_key.in_(keys))
        .order_by(RateBudgetRow.subject_id, RateBudgetRow.kind)
        .with_for_update()
    )
    grants: dict[Key, Grant] = {}
    async with db.transaction() as tx:
        rows = (await tx.execute(locked)).all()
        if len(rows) < len(keys):
            empty: list[dict[str, Any]] = [
                {"subject_id": subject_id, "kind": kind, "newest_slot": 0, "charges": []} for subject_id, kind in keys
            ]
            await tx.execute(upsert(RateBudgetRow).values(empty).on_conflict_do_nothing())
            rows = (await tx.execute(locked)).all()
        changes: list[dict[str, object]] = []
        for subject_id, kind, newest, counts, instant in rows:
            key = (subject_id, kind)
            charges, grants[key] = take(
                Charges.of(newest, counts), float(instant), limit=limit_of[key], asked=asked[key], returned=returned.get(key)
            )
            changes.append({"of": subject_id, "as": kind, "newest": charges.newest, "counts": list(charges.counts)})
        await tx.execute(
            update(RateBudgetRow)
            .where(RateBudgetRow.subject_id == bindparam("of"), RateBudgetRow.kind == bindparam("as"))
            .values(newest_slot=bindparam("newest"), charges=bindparam("counts")),
            changes,
        )
    return grants
