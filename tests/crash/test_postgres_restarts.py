"""Postgres itself is stopped, crashes, is away for a while and comes back, while everything else goes on.

A server of these tests' own: what other tests share must not go away. Meanwhile clients are told to come again in the API's own
words, and afterwards nothing was lost and nothing was done twice.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import anyio
import httpx
import pytest
from anthropic import AsyncAnthropic

from managed_agents.db import databases
from managed_agents.db.migrate import upgrade_blocking
from tests.crash.conftest import Finished
from tests.crash.test_soak import counting
from tests.support.cluster import API_KEY, Cluster, make_session, say
from tests.support.following import Follower, following
from tests.support.postgres import OwnPostgres, own_postgres
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

SESSIONS, CALLS, WORKERS = 4, 6, 2
TEMPLATE = "migrated"
HEADERS = {"x-api-key": API_KEY, "anthropic-version": "2023-06-01", "anthropic-beta": "managed-agents-2026-04-01"}
AWAY = 529  # spec: overloaded_error, which SDKs retry


@pytest.fixture(scope="module")
def postgres() -> Iterator[OwnPostgres]:
    with own_postgres() as made:
        upgrade_blocking(anyio.run(databases.create_database, made.start_blocking(), TEMPLATE))
        yield made


@pytest.fixture
async def database_url(postgres: OwnPostgres) -> AsyncIterator[str]:
    """A database on the server of these tests."""
    name = f"test_{uuid4().hex[:12]}"
    yield await databases.create_database(await postgres.start(), name, TEMPLATE)
    await databases.drop_database(await postgres.start(), name)


@dataclass
class Asker:
    """Somebody who asks all the time and never waits between; every answer must be one of the API's."""

    answers: Counter[int] = field(default_factory=Counter[int])
    made: list[str] = field(default_factory=list[str])

    async def run(self, base_url: str) -> None:
        async with httpx.AsyncClient(base_url=base_url, headers=HEADERS, timeout=20.0) as http:
            while True:
                name = uuid4().hex
                for answer in (
                    await http.get("/v1/agents"),
                    await http.post("/v1/environments", json={"name": name, "config": {"type": "cloud"}}),
                ):
                    self._check(answer)
                if answer.status_code == 200:
                    self.made.append(name)

    def _check(self, answer: httpx.Response) -> None:
        self.answers[answer.status_code] += 1
        if answer.status_code == 200:
            return
        assert answer.status_code == AWAY, answer.text
        body = answer.json()
        assert body == {
            "type": "error",
            "error": {"type": "overloaded_error", "message": "Overloaded"},
            "request_id": answer.headers["request-id"],
        }
        assert answer.headers["retry-after"] == "1"

    async def told(self) -> None:
        """Wait for an answer that the database is away, counted from now."""
        before = self.answers[AWAY]
        await until(lambda: self.answers[AWAY] > before)


@asynccontextmanager
async def asking(cluster: Cluster) -> AsyncIterator[Asker]:
    asker = Asker()
    async with anyio.create_task_group() as group:
        group.start_soon(asker.run, cluster.base_url)
        yield asker
        group.cancel_scope.cancel()


@asynccontextmanager
async def all_followed(client: AsyncAnthropic, session_ids: list[str]) -> AsyncIterator[list[Follower]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(following(client, session_id)) for session_id in session_ids]


async def check_work(followers: list[Follower], finished: Finished, *, calls: int) -> None:
    """Every session is at rest, each call ran once, in order, and the streams have shown what the lists hold."""
    for follower in followers:
        seen = await follower.idle()
        listed = await finished(follower.session_id)
        assert seen == listed
        results = [event for event in listed if event["type"] == "agent.tool_result"]
        assert [event for event in results if event["is_error"]] == []
        assert len(results) == calls
        assert results[-1]["content"][0]["text"].split() == [str(number) for number in range(calls - 1)]
        assert not [event for event in listed if event["type"] == "session.error"]


async def test_sessions_go_on_through_a_restart_and_a_crash_of_postgres(
    cluster: Cluster, client: AsyncAnthropic, postgres: OwnPostgres, finished: Finished
) -> None:
    cluster.model.reply = counting(CALLS)
    await cluster.api()
    for _ in range(WORKERS):
        cluster.worker()
    session_ids = [await make_session(client) for _ in range(SESSIONS)]
    async with all_followed(client, session_ids) as followers, asking(cluster) as asker:
        for session_id in session_ids:
            await say(client, session_id, "work")
        await cluster.model.requests(SESSIONS)
        await postgres.stop()
        await asker.told()
        # The SDK tries again by itself.
        async with cluster.client(max_retries=8) as patient, anyio.create_task_group() as group:
            group.start_soon(make_session, patient)
            await asker.told()
            await postgres.start()
        await cluster.model.requests(3 * SESSIONS)
        await postgres.crash()
        await asker.told()
        await postgres.start()
        await check_work(followers, finished, calls=CALLS)
        asked = asker.made[:]
    names = {environment.name async for environment in client.beta.environments.list(limit=100)}
    assert names >= set(asked), "what was answered with 200 is there"
