"""A cluster of real processes for each test, and what is common to the scenarios."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text

from managed_agents.db.engine import Database
from tests.crash import script
from tests.support import cluster as clusters
from tests.support.cluster import Cluster, Model, Node, history, make_session, say
from tests.support.following import Event, Follower, following
from tests.support.invariants import check_history, check_rows, normalised
from tests.support.launcher import Launcher
from tests.support.launcher import launcher as launching
from tests.support.waiting import until

Undisturbed = Callable[[], Awaitable[list[Event]]]
Finished = Callable[[str], Awaitable[list[Event]]]
Claimed = Callable[[str, str | None], Awaitable[str]]
Working = Callable[[], AbstractAsyncContextManager["Work"]]


@dataclass(frozen=True)
class Work:
    """A session whose command runs, and waits for a file beside `side` before it ends; `owner` is the worker's id."""

    worker: Node
    session_id: str
    follower: Follower
    side: Path
    owner: str


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    with launching() as made:
        yield made


@pytest.fixture(scope="session")
def expected() -> list[Event]:
    """The normalised history of undisturbed work, once somebody needed it."""
    return []


@pytest.fixture
async def model() -> AsyncIterator[Model]:
    async with clusters.scripted_model(script.work) as made:
        yield made


@pytest.fixture
async def cluster(database_url: str, model: Model, launcher: Launcher) -> AsyncIterator[Cluster]:
    async with clusters.cluster(database_url, model, launcher) as made:
        yield made


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncAnthropic]:
    async with cluster.client() as made:
        yield made


@pytest.fixture
def undisturbed(cluster: Cluster, client: AsyncAnthropic, expected: list[Event]) -> Undisturbed:
    """Returns the normalised history of the work when nothing goes wrong. The api must run, and no worker yet."""

    async def run() -> list[Event]:
        if not expected:
            worker = cluster.worker()
            session_id = await make_session(client)
            async with following(client, session_id) as follower:
                await say(client, session_id, "work")
                expected.extend(normalised(await follower.idle()))
            await worker.kill()
            cluster.model.recorder.clear()
        return expected

    return run


@pytest.fixture
def finished(client: AsyncAnthropic, db: Database) -> Finished:
    """Checks a session at rest from every side, and returns its history."""

    async def check(session_id: str) -> list[Event]:
        async def at_rest() -> bool:
            async with db.transaction() as tx:
                row = (await tx.execute(text("SELECT owner FROM sessions WHERE id = :id"), {"id": session_id})).one()
            return row.owner is None

        await until(at_rest)
        listed = await history(client, session_id)
        check_history(listed)
        await check_rows(db, session_id, listed)
        return listed

    return check


@pytest.fixture
def claimed(db: Database) -> Claimed:
    """Waits until a worker other than `but` owns the session; returns the owner's id."""

    async def wait(session_id: str, but: str | None) -> str:
        async def owner() -> str | None:
            async with db.transaction() as tx:
                row: Any = (await tx.execute(text("SELECT owner FROM sessions WHERE id = :id"), {"id": session_id})).one()
            return row.owner if row.owner != but else None

        found = await until(owner)
        assert found is not None
        return found

    return wait


@pytest.fixture
def working(cluster: Cluster, client: AsyncAnthropic, claimed: Claimed) -> Working:
    """An api, a worker, and a session in the middle of a command, followed during the block."""

    @asynccontextmanager
    async def work() -> AsyncIterator[Work]:
        cluster.model.reply = script.gated_work
        await cluster.api()
        worker = cluster.worker()
        session_id = await make_session(client)
        async with following(client, session_id) as follower:
            await say(client, session_id, "work")
            side = await cluster.appeared(script.SIDE)
            yield Work(worker, session_id, follower, side, await claimed(session_id, None))

    return work
