"""The same promise with real containers."""

from collections.abc import AsyncIterator

import anyio
import pytest
from anthropic import AsyncAnthropic

from tests.crash import script
from tests.crash.conftest import Claimed, Finished
from tests.support import cluster as clusters
from tests.support.cluster import Cluster, Model, make_session, say
from tests.support.following import following
from tests.support.launcher import Launcher
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture
async def cluster(database_url: str, model: Model, launcher: Launcher) -> AsyncIterator[Cluster]:
    async with clusters.cluster(database_url, model, launcher, sandbox="docker") as made:
        yield made


async def docker(*arguments: str) -> str | None:
    """Run the engine's client; None when it failed."""
    with anyio.fail_after(30):
        done = await anyio.run_process(["docker", *arguments], check=False)
    return done.stdout.decode().strip() if done.returncode == 0 else None


@pytest.mark.requirement("SES-081")
async def test_a_command_in_a_container_runs_once_though_its_worker_was_killed(
    cluster: Cluster, client: AsyncAnthropic, claimed: Claimed, finished: Finished
) -> None:
    cluster.model.reply = script.gated_work
    await cluster.api()
    worker = cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        # By name as well: what makes volumes ready bears the session's label too.
        mine = ("--filter", f"label=managed-agents.session={session_id}", "--filter", "name=^ma-")
        container = await until(lambda: docker("ps", "-q", *mine))
        assert container is not None
        side = f"/workspace/{script.SIDE}"
        await until(lambda: docker("exec", container, "cat", side))
        owner = await claimed(session_id, None)
        await worker.kill()
        cluster.worker()
        await claimed(session_id, owner)
        # The container's root may not write what commands own.
        uid = await docker("exec", container, "stat", "-c", "%u", side)
        assert await docker("exec", "--user", uid or "", container, "touch", f"/workspace/{script.GO}") is not None
        seen = await follower.idle()
        assert await docker("exec", container, "cat", side) == "ran"
    listed = await finished(session_id)
    assert seen == listed
    results = [event["content"][0]["text"] for event in listed if event["type"] == "agent.tool_result"]
    assert results[-1].splitlines() == ["1", "a note"]
