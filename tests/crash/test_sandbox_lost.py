"""Sandboxes and hosts that die: what the snapshot had comes back, here or on another host, and the model is told of the rest."""

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.harness.hands import CRASHED
from managed_agents.scripted_model import Reply, Request, tool_use
from tests.crash import script
from tests.crash.conftest import Finished
from tests.support import cluster as clusters
from tests.support.cluster import Cluster, Model, make_session, say
from tests.support.following import Event, following
from tests.support.launcher import Launcher
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

LOOK = f"cat /workspace/{script.NOTES} 2>&1; echo $WHO"


def kept_work(request: Request) -> Reply:
    """A turn with a note, a variable and a command that waits; then turns of one look each."""
    asked = request.messages[-1]["content"]
    said = asked if isinstance(asked, str) else asked[-1].get("text")
    if said == "work":
        return [tool_use("bash", command=f"echo a note > /workspace/{script.NOTES}; export WHO=me; {script.GATED}")]
    return [tool_use("bash", command=LOOK)] if said == "look" else "done"


@pytest.fixture
async def cluster(database_url: str, model: Model, launcher: Launcher) -> AsyncIterator[Cluster]:
    async with clusters.cluster(database_url, model, launcher, sandbox_snapshot_seconds="0.3", host_name="first") as made:
        model.reply = kept_work
        yield made


@asynccontextmanager
async def another_host(cluster: Cluster) -> AsyncIterator[Cluster]:
    """The same cluster as seen from a host with sandboxes of its own."""
    data_dir = Path(tempfile.mkdtemp(prefix="ma-crash-"))
    data_dir.chmod(0o755)
    settings = {
        **cluster.settings,
        "MANAGED_AGENTS_DATA_DIR": str(data_dir),
        "MANAGED_AGENTS_HOST_NAME": "second",
        "MANAGED_AGENTS_BLOB_STORE": f"file://{cluster.data_dir / 'blobs'}",
        "MANAGED_AGENTS_MASTER_KEY_FILE": str(cluster.data_dir / "master.key"),
    }
    other = replace(cluster, data_dir=data_dir, settings=settings, nodes=[])
    try:
        yield other
    finally:
        with anyio.CancelScope(shield=True):
            await other.end()
        shutil.rmtree(data_dir)


async def snapshotted(db: Database, session_id: str) -> None:
    """Wait for a snapshot that was begun from now on."""
    async with db.transaction() as tx:
        now = (await tx.execute(text("SELECT clock_timestamp()"))).scalar_one()

    async def taken() -> bool:
        async with db.transaction() as tx:
            query = text("SELECT taken_at > :now FROM sandbox_snapshots WHERE session_id = :id")
            return bool((await tx.execute(query, {"id": session_id, "now": now})).scalar_one_or_none())

    await until(taken)


def lose_sandboxes(cluster: Cluster) -> None:
    """End and remove every sandbox of the host by hand."""
    for pid in cluster.data_dir.glob("sandboxes/*/pid"):
        os.kill(int(pid.read_text()), signal.SIGKILL)
    for home in cluster.data_dir.glob("sandboxes/*"):
        shutil.rmtree(home)


def results(events: list[Event]) -> list[str]:
    return [event["content"][0]["text"] for event in events if event["type"] == "agent.tool_result"]


async def test_a_worker_that_dies_taking_a_snapshot_leaves_the_turn_as_it_was(
    cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished
) -> None:
    await cluster.api()
    worker = cluster.worker("snapshot.stored:kill")
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        side = await cluster.appeared(script.SIDE)
        assert await worker.ended() == -signal.SIGKILL
        cluster.worker()
        await snapshotted(db, session_id)
        side.with_name(script.GO).touch()
        await follower.idle()
    assert results(await finished(session_id)) == ["finished\n"]
    assert side.read_text() == "ran\n"


@pytest.mark.requirement("ENV-056")
async def test_a_worker_that_dies_restoring_leaves_the_restore_to_the_next(
    cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished
) -> None:
    await cluster.api()
    worker = cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        side = await cluster.appeared(script.SIDE)
        await snapshotted(db, session_id)
        lose_sandboxes(cluster)  # in mid-call
        await follower.idle()
        await worker.kill()
        dying = cluster.worker("hands.restored:kill")
        await say(client, session_id, "look")
        assert await dying.ended() == -signal.SIGKILL
        cluster.worker()
        await follower.idle(2)
    crashed, looked = results(await finished(session_id))
    assert crashed == CRASHED
    # The shell was at work when the snapshot was taken: its state is as of before.
    assert looked.startswith("[The sandbox was lost and replaced. ")
    assert looked.endswith("\na note\n\n")
    assert not side.exists()
    async with db.transaction() as tx:
        rows = await tx.execute(text("SELECT generation, state FROM sandboxes WHERE session_id = :id"), {"id": session_id})
        assert max(rows.all())[:2] == (3, "live")


@pytest.mark.requirement("ENV-058")
async def test_a_session_goes_to_another_host_when_its_own_is_silent(
    cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished
) -> None:
    await cluster.api()
    worker = cluster.worker()
    session_id = await make_session(client)
    async with another_host(cluster) as other, following(client, session_id) as follower:
        await say(client, session_id, "work")
        side = await cluster.appeared(script.SIDE)
        other.worker()
        await snapshotted(db, session_id)
        side.with_name(script.GO).touch()
        await follower.idle()
        # Its host lives, so it is not the other's, which is idle.
        await say(client, session_id, "look")
        await follower.idle(2)
        assert other.in_workspaces(script.NOTES) == []
        await worker.kill()
        await say(client, session_id, "look")
        await follower.idle(3)
        await say(client, session_id, "look")
        await follower.idle(4)
        assert len(other.in_workspaces(script.NOTES)) == 1
        # The first host comes back: its sandbox is of a lower generation and goes.
        cluster.worker()
        await until(lambda: cluster.in_workspaces(script.NOTES) == [])
    first, second, third, fourth = results(await finished(session_id))
    assert (first, second) == ("finished\n", "a note\nme\n")
    assert third == CRASHED
    assert fourth.startswith("[The sandbox was lost and replaced. ")
    assert "\na note\n" in fourth  # the shell was at work when the snapshot was taken
