"""Postgres itself is stopped, crashes, is away for a while and comes back, while everything else goes on.

A server of these tests' own: what other tests share must not go away. Meanwhile clients are told to come again in the API's own
words, and afterwards nothing was lost and nothing was done twice.
"""

import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import anyio
import httpx
import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.db import databases
from managed_agents.db.engine import Database
from managed_agents.db.migrate import upgrade_blocking
from tests.crash import script
from tests.crash.conftest import Claimed, Finished, Working
from tests.crash.test_soak import counting, full, report, soak
from tests.support import cluster as clusters
from tests.support.cluster import API_KEY, Cluster, Model, make_session, say
from tests.support.following import Follower, following
from tests.support.launcher import Launcher
from tests.support.postgres import OwnPostgres, own_postgres
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

SESSIONS, CALLS, WORKERS = 4, 6, 2
TEMPLATE = "migrated"
HEADERS = {"x-api-key": API_KEY, "anthropic-version": "2023-06-01", "anthropic-beta": "managed-agents-2026-04-01"}
AWAY = 529  # spec: overloaded_error, which SDKs retry
PASSWORD = "not-to-be-told"
BACK_SECONDS_MAX = 15.0
LOG_LINES_MAX = 25  # of one process in an outage, however long: each kind of trouble speaks once a minute
MIB = 1024 * 1024
ANOTHER_BACKEND = text(
    "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() LIMIT 1"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[OwnPostgres]:
    with own_postgres() as made:
        upgrade_blocking(anyio.run(databases.create_database, made.start_blocking(), TEMPLATE))
        yield made


@pytest.fixture
async def database_url(postgres: OwnPostgres) -> AsyncIterator[str]:
    """A database on the server of these tests."""
    name = f"test_{uuid4().hex[:12]}"
    url = make_url(await databases.create_database(await postgres.start(), name, TEMPLATE))
    yield url.set(password=PASSWORD).render_as_string(hide_password=False)
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


async def test_restarts_do_not_count_as_deaths_of_workers(
    postgres: OwnPostgres, db: Database, claimed: Claimed, working: Working, finished: Finished
) -> None:
    async with working() as work:
        owner = work.owner
        # As many deaths without progress would make it wait, alone among all sessions.
        for way in ("stopped", "one process killed", "stopped"):
            if way == "stopped":
                await postgres.stop()
                await postgres.start()
            else:
                # The server ends all connections and recovers, without being started anew. Ours ends first.
                async with db.transaction() as tx:
                    victim: int = (await tx.execute(ANOTHER_BACKEND)).scalar_one()
                os.kill(victim, signal.SIGKILL)
            owner = await claimed_again(claimed, work.session_id, owner)
        assert await crashes(db, work.session_id) == (0, None)
        work.side.with_name(script.GO).touch()
        seen = await work.follower.idle()
    assert seen == await finished(work.session_id)
    assert work.side.read_text() == "ran\n"


async def test_a_worker_that_does_not_come_back_with_postgres_counts(
    cluster: Cluster, postgres: OwnPostgres, db: Database, claimed: Claimed, working: Working, finished: Finished
) -> None:
    """A session may be what takes the whole host down."""
    async with working() as work:
        await work.worker.kill()
        await postgres.crash()
        await postgres.start()
        cluster.worker()
        await claimed_again(claimed, work.session_id, work.owner)
        assert await crashes(db, work.session_id) == (1, None)
        work.side.with_name(script.GO).touch()
        seen = await work.follower.idle()
    assert seen == await finished(work.session_id)


async def claimed_again(claimed: Claimed, session_id: str, owner: str) -> str:
    """Wait for the next owner; the database may be away while we ask."""
    while True:
        try:
            return await claimed(session_id, owner)
        except (SQLAlchemyError, OSError):
            await anyio.lowlevel.checkpoint()


async def crashes(db: Database, session_id: str) -> tuple[int, object]:
    async with db.transaction() as tx:
        row = (await tx.execute(text("SELECT crashes, not_before FROM sessions WHERE id = :id"), {"id": session_id})).one()
        return row.crashes, row.not_before


def memory_bytes(pid: int) -> int:
    """What a process holds of its own."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))


async def _away(database_url: str, model: Model, launcher: Launcher, postgres: OwnPostgres, *, seconds: float) -> None:
    """Processes that start and processes that idle while Postgres is away for so long."""
    model.reply = counting(2)
    metrics_port = clusters.free_port()
    async with clusters.cluster(database_url, model, launcher) as cluster, cluster.client() as client:
        idle_api, idle_worker = await cluster.api(), cluster.worker()
        session_id = await make_session(client)
        async with following(client, session_id) as follower, httpx.AsyncClient(timeout=20.0) as http:
            await say(client, session_id, "work")
            await follower.idle()
            await postgres.stop()
            logged = [(node, len(node.log.read_text().splitlines())) for node in (idle_api, idle_worker)]
            held = [(node, memory_bytes(node.pid)) for node, _ in logged]

            async def readiness(url: str) -> int:
                try:
                    answer = await http.get(f"{url}/readyz")
                except httpx.TransportError:
                    return 0
                if answer.status_code == 503:
                    assert answer.json()["reason"].startswith("database unreachable")
                return answer.status_code

            async with cluster.beside() as other:
                cluster.settings["MANAGED_AGENTS_METRICS_PORT"] = str(metrics_port)
                new_worker = cluster.worker()
                logged += [(new_worker, 0), (other.nodes[0], 0)]
                places = (cluster.base_url, other.base_url, f"http://127.0.0.1:{metrics_port}")
                gone_at = anyio.current_time()
                for url in places:
                    await until(lambda url=url: _is(readiness(url), 503))
                    assert (await http.get(f"{url}/healthz")).status_code == 200
                for url in places[:2]:
                    answer = await http.get(f"{url}/v1/agents", headers=HEADERS)
                    assert (answer.status_code, answer.json()["error"]["type"]) == (AWAY, "overloaded_error")
                # Not one of them ends, or is ready, until it is back.
                while anyio.current_time() < gone_at + seconds:
                    assert [node.status for node, _ in logged] == [None] * 4
                    assert [await readiness(url) for url in places] == [503] * 3
                    await anyio.sleep(0.2)
                for node, before in logged:
                    lines = [line for line in node.log.read_text().splitlines()[before:] if '"not ready"' not in line]
                    assert len(lines) <= LOG_LINES_MAX, node.tail()
                    assert not [line for line in lines if "traceback" in line]
                for node, before in held:
                    assert memory_bytes(node.pid) < before + 16 * MIB
                await postgres.start()
                back_at = anyio.current_time()
                for url in places:
                    await until(lambda url=url: _is(readiness(url), 200))
                await say(client, session_id, "work")
                seen = await follower.idle(2)
                assert anyio.current_time() - back_at < BACK_SECONDS_MAX
                async with other.client() as elsewhere:
                    again = await make_session(elsewhere)
                    async with following(elsewhere, again) as there:
                        await say(elsewhere, again, "work")
                        await there.idle()
            assert seen == await clusters.history(client, session_id)
        for log in cluster.data_dir.glob("*.log"):
            assert PASSWORD not in log.read_text()
            assert API_KEY not in log.read_text()


async def _is(asked: Awaitable[int], wanted: int) -> bool:
    return await asked == wanted


async def test_what_starts_or_idles_while_postgres_is_away_waits_and_recovers(
    database_url: str, model: Model, launcher: Launcher, postgres: OwnPostgres
) -> None:
    await _away(database_url, model, launcher, postgres, seconds=1.0)


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_postgres_is_away_for_longer(database_url: str, model: Model, launcher: Launcher, postgres: OwnPostgres) -> None:
    await _away(database_url, model, launcher, postgres, seconds=75.0)


@pytest.mark.full
@pytest.mark.timeout(3600)
async def test_a_soak_with_a_postgres_that_restarts_again_and_again(
    cluster: Cluster, client: AsyncAnthropic, db: Database, postgres: OwnPostgres, finished: Finished
) -> None:
    report("restarts", await soak(cluster, client, db, finished, full("restarts", 100), postgres))
