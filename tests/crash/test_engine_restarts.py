"""The Docker engine itself is killed in the midst of a call, alone or with everything below it, or is stopped, and comes back.

An engine of these tests' own, and real workers on it. Each ends with work going on without hands, and as much of everything as
before: containers, volumes, images, mounts, loop devices, sockets, directories, processes.
"""

import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import anyio
import pytest
from anthropic import AsyncAnthropic
from anyio import to_thread
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.harness.hands import CRASHED
from managed_agents.scripted_model import Reply, Request, tool_use
from tests.crash.conftest import Finished
from tests.support import cluster as clusters
from tests.support.cluster import MODEL, Cluster, Model, say
from tests.support.engine import OwnEngine, own_engine
from tests.support.following import Event, following
from tests.support.launcher import Launcher
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.docker, pytest.mark.full, pytest.mark.timeout(600)]

WAITING = "echo kept > kept; touch started; until [ -e go ]; do sleep 0.02; done; echo through"
LOOK = "cat kept"
PREPARED_SECONDS_MAX = 60.0
SETTLED_SECONDS_MAX = 90.0
AWAY_SECONDS = 45.0  # longer than anything waits for a runner


@pytest.fixture(scope="module")
def engine() -> Iterator[OwnEngine]:
    with own_engine() as made:
        yield made


@pytest.fixture
def pools() -> Iterator[Path]:
    with NamedTemporaryFile("w", suffix=".toml") as file:
        yield Path(file.name)


@pytest.fixture
async def cluster(
    database_url: str, model: Model, launcher: Launcher, engine: OwnEngine, pools: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Cluster]:
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    model.reply = as_told
    settings = {
        "sandbox": "docker",
        "sandbox_environments": str(pools),
        "sandbox_memory_bytes": str(256 * 1024**2),
        "sandbox_disk_bytes": str(128 * 1024**2),
        "sandbox_snapshot_seconds": "0.5",
    }
    async with clusters.cluster(database_url, model, launcher, **settings) as made:
        yield made


def as_told(request: Request) -> Reply:
    """Runs what the last message says after `run`, once; says "Hello." to everything else."""
    asked = request.messages[-1]["content"]
    said = asked if isinstance(asked, str) else asked[-1].get("text")
    if said is not None and said.startswith("run "):
        return [tool_use("bash", command=said.removeprefix("run "))]
    return "Hello."


@dataclass
class Site:
    """A cluster with one environment that has a pool of one."""

    cluster: Cluster
    client: AsyncAnthropic
    engine: OwnEngine
    environment_id: str
    agent_id: str

    async def session(self) -> str:
        made = await self.client.beta.sessions.create(agent=self.agent_id, environment_id=self.environment_id)
        return made.id

    def holds(self) -> dict[str, int]:
        """What the engine and the worker hold."""
        directory = self.cluster.data_dir
        loops = subprocess.run(("losetup", "-a"), capture_output=True, text=True, timeout=30, check=True).stdout
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return self.engine.holds() | {
            "loop devices": loops.count(str(directory)),
            "disks mounted": sum(str(directory) in line for line in mounts),
            "directories": len(list((directory / "sandboxes").glob("*"))),
            "run directories": len(list((directory / "run").glob("[!.]*"))),
            "sockets": len([path for path in (directory / "run").rglob("*") if path.is_socket()]),
        }

    async def settled(self, like: dict[str, int] | None = None) -> dict[str, int]:
        """Wait until the pool is full and nothing else is there, as much as in `like`; returns what is held."""

        async def only_the_pool() -> bool:
            running = self.engine.command("ps", "-q", check=False)
            found = self.holds()
            parts = ("containers", "loop devices", "disks mounted", "directories", "run directories")
            full = len(running) == 1 and all(found[part] == 1 for part in parts) and found["sockets"] == 2
            return full and like in (None, found)

        with suppress(TimeoutError):  # what differs says more
            await until(only_the_pool, seconds=SETTLED_SECONDS_MAX)
        return self.holds()

    async def pool_filled(self) -> None:
        """Wait for what takes the adopted one's place: an engine that is killed while it makes a container keeps parts of it."""

        def both() -> bool:
            return len(self.engine.command("ps", "-q")) == 2 and self.holds()["sockets"] == 4

        await until(both, seconds=PREPARED_SECONDS_MAX)

    def in_workspaces(self, name: str) -> list[Path]:
        return list(self.cluster.data_dir.glob(f"sandboxes/*/disk/workspace/{name}"))


@pytest.fixture
async def site(cluster: Cluster, client: AsyncAnthropic, engine: OwnEngine, pools: Path) -> Site:
    await cluster.api()
    environment = await client.beta.environments.create(name="pooled", config={"type": "cloud"})
    pools.write_text(f"[{environment.id}]\npool = 1\n")
    agent = await client.beta.agents.create(name="worker", model=MODEL, tools=[{"type": "agent_toolset_20260401"}])
    cluster.worker()
    return Site(cluster, client, engine, environment.id, agent.id)


def results(events: list[Event]) -> list[str]:
    return [event["content"][0]["text"] for event in events if event["type"] == "agent.tool_result"]


async def snapshotted(db: Database, session_id: str) -> None:
    """Wait for a snapshot that has what the running call wrote."""
    async with db.transaction() as tx:
        now = (await tx.execute(text("SELECT clock_timestamp()"))).scalar_one()

    async def taken() -> bool:
        async with db.transaction() as tx:
            query = text("SELECT taken_at > :now FROM sandbox_snapshots WHERE session_id = :id")
            return bool((await tx.execute(query, {"id": session_id, "now": now})).scalar_one_or_none())

    await until(taken)


async def _takes_everything(engine: OwnEngine) -> None:
    await engine.end(signal.SIGKILL)
    await to_thread.run_sync(engine.kill_below)


async def _stops(engine: OwnEngine) -> None:
    await engine.end(signal.SIGTERM)


@pytest.mark.parametrize("outage", [_takes_everything, _stops], ids=["killed with all below it", "stopped"])
async def test_the_engine_goes_away_with_its_containers_in_mid_call(
    site: Site, db: Database, finished: Finished, outage: Any
) -> None:
    before = await site.settled()
    session_id, other_id = await site.session(), await site.session()
    async with following(site.client, session_id) as follower, following(site.client, other_id) as beside:
        await say(site.client, session_id, f"run {WAITING}")
        await until(lambda: site.in_workspaces("started"), seconds=PREPARED_SECONDS_MAX)
        await snapshotted(db, session_id)
        await site.pool_filled()
        await outage(site.engine)
        # What needs no sandbox goes on.
        await say(site.client, other_id, "hello")
        await beside.idle()
        await site.engine.start()
        seen = await follower.until(lambda events: bool(results(events)), seconds=PREPARED_SECONDS_MAX)
        assert results(seen) == [CRASHED]
        await follower.idle()
        await say(site.client, session_id, f"run {LOOK}")
        await follower.idle(2)
        assert results(await finished(session_id))[1].endswith("kept\n")
        await say(site.client, other_id, "run echo here")
        await beside.idle(2)
        assert results(await finished(other_id)) == ["here\n"]
    for each in (session_id, other_id):
        await site.client.beta.sessions.delete(each)
    assert await site.settled(before) == before


async def test_the_engine_is_killed_and_its_containers_live(site: Site, db: Database, finished: Finished) -> None:
    before = await site.settled()
    session_id, other_id = await site.session(), await site.session()
    async with following(site.client, session_id) as follower:
        await say(site.client, session_id, f"run {WAITING}")
        started = await until(lambda: site.in_workspaces("started"), seconds=PREPARED_SECONDS_MAX)
        await snapshotted(db, session_id)
        await site.pool_filled()
        await site.engine.end(signal.SIGKILL)
        # A call that runs needs no engine.
        started[0].with_name("go").touch()
        await follower.idle()
        assert results(await finished(session_id)) == ["through\n"]
        await site.engine.start()
        await say(site.client, session_id, f"run {LOOK}")
        await follower.idle(2)
        assert results(await finished(session_id))[1].endswith("kept\n")
    for each in (session_id, other_id):
        await site.client.beta.sessions.delete(each)
    assert await site.settled(before) == before


async def test_the_engine_is_away_for_longer(site: Site, db: Database, finished: Finished) -> None:
    before = await site.settled()
    session_id, other_id, third_id = [await site.session() for _ in range(3)]
    async with following(site.client, session_id) as follower, following(site.client, other_id) as beside:
        await say(site.client, session_id, f"run {WAITING}")
        await until(lambda: site.in_workspaces("started"), seconds=PREPARED_SECONDS_MAX)
        await snapshotted(db, session_id)
        await site.pool_filled()
        await site.engine.end(signal.SIGTERM)
        gone_at = anyio.current_time()
        # The call under way, a call for which there is no sandbox yet, and one that needs none.
        await say(site.client, other_id, "run echo here")
        async with following(site.client, third_id) as model_only:
            await say(site.client, third_id, "hello")
            await model_only.idle()
        assert anyio.current_time() - gone_at < AWAY_SECONDS / 2
        await beside.until(lambda events: bool(results(events)), seconds=AWAY_SECONDS)
        await follower.until(lambda events: bool(results(events)), seconds=2 * AWAY_SECONDS)
        await beside.idle()
        await follower.idle()
        assert "could not run this call: the engine does not answer" in results(await finished(other_id))[0]
        assert results(await finished(session_id)) == [CRASHED]
        assert len(list(site.cluster.nodes[-1].log.read_text().splitlines())) < 100
        await site.engine.start()
        for watch, each, said in ((follower, session_id, LOOK), (beside, other_id, "echo here")):
            await say(site.client, each, f"run {said}")
            await watch.idle(2)
        assert results(await finished(session_id))[1].endswith("kept\n")
        assert results(await finished(other_id))[1] == "here\n"
    for each in (session_id, other_id, third_id):
        await site.client.beta.sessions.delete(each)
    assert await site.settled(before) == before
