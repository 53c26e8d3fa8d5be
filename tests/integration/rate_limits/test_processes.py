"""Four real api processes on one database: one budget, one answer about a key."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import httpx
import pytest

from managed_agents.db.engine import Database
from managed_agents.encryption.keyring import LocalKeyProvider
from managed_agents.processes.purposes import API_KEYS
from managed_agents.resources.keys import service as keys
from managed_agents.resources.organizations import service as organizations
from tests.support.cluster import API_KEY, Cluster, cluster, scripted_model
from tests.support.launcher import launcher
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

PROCESSES = 4
READS = 400  # a minute, for a quicker test than 1,200
HEADERS = {"anthropic-version": "2023-06-01", "anthropic-beta": "managed-agents-2026-04-01"}
SECONDS_MAX = 60.0


@asynccontextmanager
async def processes(database_url: str) -> AsyncIterator[list[Cluster]]:
    """The api processes, as seen at the address of each."""
    limits = {"rate_limits": "on", "rate_limit_reads_per_minute": str(READS)}
    with launcher() as starting:
        async with (
            scripted_model(lambda _: "ok") as model,
            cluster(database_url, model, starting, **limits) as first,
            AsyncExitStack() as stack,
        ):
            await first.api()
            yield [first, *[await stack.enter_async_context(first.beside()) for _ in range(PROCESSES - 1)]]


@pytest.mark.requirement("ORG-004", "ORG-020", "ORG-022")
async def test_four_api_processes_share_a_budget_and_hear_of_a_revocation(database_url: str, db: Database) -> None:
    async with processes(database_url) as made, AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=each.base_url, headers=HEADERS, timeout=30.0))
            for each in made
        ]
        hmac_key = LocalKeyProvider(made[0].data_dir / "master.key").derive(API_KEYS)
        default = await organizations.default_workspace(db)
        brief = await keys.create(db, hmac_key, workspace_id=default.id, name="brief")
        secret = {"x-api-key": brief.secret.get_secret_value()}
        used = 0
        for client in clients:
            assert (await client.get("/v1/agents", headers=secret)).status_code == 200
            used += 1
        await keys.revoke(db, brief.key.id)

        async def refused_everywhere() -> bool:
            nonlocal used
            statuses = [(await client.get("/v1/agents", headers=secret)).status_code for client in clients]
            used += statuses.count(200)
            return statuses == [401] * PROCESSES

        await until(refused_everywhere, seconds=SECONDS_MAX)

        passed = 0
        refusal: httpx.Response | None = None
        left = READS * 2
        mine = {"x-api-key": API_KEY}

        async def ask(client: httpx.AsyncClient) -> None:
            nonlocal passed, refusal, left
            while left > 0:
                left -= 1
                answer = await client.get("/v1/organizations/me", headers=mine)
                if answer.status_code == 200:
                    passed += 1
                    assert answer.headers["anthropic-ratelimit-requests-limit"] == str(READS)
                else:
                    refusal = answer
                    left = min(left, 100)  # a few more refusals will do

        with anyio.fail_after(SECONDS_MAX):
            async with anyio.create_task_group() as group:
                for client in clients:
                    for _ in range(3):
                        group.start_soon(ask, client)
        # A machine so slow that this took longer than a minute would see new budget: then nothing is proven.
        assert passed + used <= READS
        assert passed + used >= READS * 0.9
        assert refusal is not None
        assert refusal.status_code == 429
        body = refusal.json()
        assert body["error"]["type"] == "rate_limit_error"
        assert body["request_id"] == refusal.headers["request-id"]
        assert 1 <= int(refusal.headers["retry-after"]) <= 64
        assert refusal.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert refusal.headers["anthropic-organization-id"] == default.organization_id
        # What is not counted goes on.
        assert (await clients[0].post("/v1/agents/agent_01x/archive", headers=mine)).status_code == 404
