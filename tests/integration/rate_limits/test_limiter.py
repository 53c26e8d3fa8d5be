"""Several limiters on one database share a budget: never over it, hardly refused early, hardly a look at the database."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest
from sqlalchemy import text

from managed_agents.core.errors import RateLimited, TransientError
from managed_agents.core.ids import ApiKeyId, OrganizationId, WorkspaceId
from managed_agents.db.engine import Database
from managed_agents.resources.rate_limits.limiter import Limiter
from managed_agents.web.actor import Actor, RateKind, Scope

pytestmark = pytest.mark.anyio

PROCESSES = 4
CREATES, READS = 300, 1200


def actor(**own: int) -> Actor:
    return Actor(OrganizationId("org_01a"), WorkspaceId("wrkspc_01a"), ApiKeyId("apikey_01a"), Scope.DEVELOPER, **own)


@asynccontextmanager
async def limiters(database_url: str, count: int = PROCESSES) -> AsyncIterator[list[Limiter]]:
    """As many as processes, each with an engine of its own."""
    async with AsyncExitStack() as stack:
        engines = [Database(database_url, pool=2, application_name="test limiter") for _ in range(count)]
        for engine in engines:
            stack.push_async_callback(engine.dispose)
        made = [Limiter(engine, {RateKind.CREATE: CREATES, RateKind.READ: READS}) for engine in engines]
        async with anyio.create_task_group() as group:
            for limiter in made:
                group.start_soon(limiter.run)
            yield made
            group.cancel_scope.cancel()


async def flood(limiter: Limiter, kind: RateKind, requests: int, at_once: int = 20, who: Actor | None = None) -> int:
    """Send so many requests, a few side by side; returns how many were let through."""
    passed = 0
    left = requests

    async def client() -> None:
        nonlocal passed, left
        while left > 0:
            left -= 1
            try:
                await limiter.admit(who or actor(), kind)
                passed += 1
            except RateLimited:
                continue

    async with anyio.create_task_group() as group:
        for _ in range(at_once):
            group.start_soon(client)
    return passed


async def shares(made: Sequence[Limiter], kind: RateKind, requests: Sequence[int]) -> list[int]:
    passed = [0] * len(made)

    async def one(index: int) -> None:
        passed[index] = await flood(made[index], kind, requests[index])

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for index in range(len(made)):
                group.start_soon(one, index)
    return passed


@pytest.mark.requirement("ORG-020")
@pytest.mark.parametrize(("kind", "limit"), [(RateKind.CREATE, CREATES), (RateKind.READ, READS)])
async def test_four_processes_never_exceed_the_limit_and_refuse_little_early(
    database_url: str, kind: RateKind, limit: int
) -> None:
    async with limiters(database_url) as made:
        passed = await shares(made, kind, [limit] * PROCESSES)
        assert limit * 0.9 <= sum(passed) <= limit
        assert sum(limiter.looks for limiter in made) < limit / 3, "a look at the database costs more than a request"


async def test_an_uneven_load_gets_all_of_the_budget_but_what_idle_processes_hold(database_url: str) -> None:
    async with limiters(database_url) as made:
        few = await shares(made, RateKind.CREATE, [0, 1, 1, 1])
        assert few == [0, 1, 1, 1]
        passed = await flood(made[0], RateKind.CREATE, CREATES)
        assert CREATES * 0.9 <= passed + 3 <= CREATES


async def test_what_is_not_spent_is_given_back(database_url: str, db: Database) -> None:
    async with limiters(database_url) as made:
        assert await shares(made, RateKind.READ, [1] * PROCESSES) == [1] * PROCESSES

        async def charged() -> int:
            async with db.transaction() as tx:
                return await tx.scalar(text("SELECT sum(charge) FROM rate_budgets, unnest(charges) charge")) or 0

        with anyio.fail_after(30):
            while await charged() != PROCESSES:
                await anyio.sleep(0.1)  # until the blocks have ended, which is a matter of seconds


@pytest.mark.requirement("ORG-022")
async def test_a_refusal_says_when_to_come_back(database_url: str) -> None:
    async with limiters(database_url, 1) as (limiter,):
        admission = await limiter.admit(actor(), RateKind.CREATE)
        assert (admission.limit, admission.remaining) == (CREATES, CREATES - 1)
        await flood(limiter, RateKind.CREATE, CREATES)
        looks = limiter.looks
        with pytest.raises(RateLimited) as refusal:
            await limiter.admit(actor(), RateKind.CREATE)
        headers = refusal.value.headers
        assert refusal.value.status == 429
        assert 1 <= int(headers["retry-after"]) <= 64
        assert headers["anthropic-ratelimit-requests-limit"] == str(CREATES)
        assert headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert headers["anthropic-ratelimit-requests-reset"].endswith("Z")
        assert await flood(limiter, RateKind.CREATE, 1000) == 0
        assert limiter.looks <= looks + 2, "a used up budget is not asked again for every refused request"
        assert await flood(limiter, RateKind.READ, 10) == 10  # the other budget is another one


@pytest.mark.requirement("ORG-023")
async def test_a_workspaces_own_limit_holds_beside_the_organizations(database_url: str) -> None:
    async with limiters(database_url, 2) as made:
        mine = actor(creates_per_minute=20)
        passed = [await flood(limiter, RateKind.CREATE, 30, who=mine) for limiter in made]
        assert 18 <= sum(passed) <= 20
        with pytest.raises(RateLimited, match="your workspace: 20 create requests"):
            await made[0].admit(mine, RateKind.CREATE)
        # A value above the organisation's changes nothing, and what the workspace used is gone from the organisation's.
        rest = [await flood(limiter, RateKind.CREATE, CREATES, who=actor(creates_per_minute=9000)) for limiter in made]
        assert CREATES * 0.9 <= sum(rest) + sum(passed) <= CREATES
        with pytest.raises(RateLimited, match="your organization: 300 create requests"):
            await made[1].admit(actor(creates_per_minute=9000), RateKind.CREATE)
        with pytest.raises(RateLimited) as refusal:
            await made[0].admit(actor(reads_per_minute=0), RateKind.READ)
        assert refusal.value.headers["retry-after"] in ("59", "60")


async def test_without_the_database_nothing_is_let_through_uncounted(database_url: str, db: Database) -> None:
    async with limiters(database_url, 1) as (limiter,):
        await limiter.admit(actor(), RateKind.READ)
        async with db.transaction() as tx:
            await tx.execute(text("ALTER TABLE rate_budgets RENAME TO away"))
        with pytest.raises(TransientError):
            await limiter.admit(actor(), RateKind.CREATE)
        async with db.transaction() as tx:
            await tx.execute(text("ALTER TABLE away RENAME TO rate_budgets"))
        with anyio.fail_after(30):
            while True:  # it recovers by itself
                try:
                    await limiter.admit(actor(), RateKind.CREATE)
                    break
                except TransientError:
                    continue
