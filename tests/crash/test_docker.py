"""The same promise with real containers."""

import os
from collections.abc import AsyncIterator, Iterator

import anyio
import pytest
from anthropic import AsyncAnthropic

from managed_agents.scripted_model import tool_use
from tests.crash import script
from tests.crash.conftest import Claimed, Finished
from tests.support import cluster as clusters
from tests.support.cluster import Cluster, Model, make_session, say
from tests.support.following import following
from tests.support.git_server import GitHost, git_host
from tests.support.launcher import Launcher
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture
async def cluster(database_url: str, model: Model, launcher: Launcher) -> AsyncIterator[Cluster]:
    async with clusters.cluster(database_url, model, launcher, sandbox="docker") as made:
        yield made


@pytest.fixture
def host() -> Iterator[GitHost]:
    with git_host() as made:
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


@pytest.mark.requirement("SES-098")
async def test_a_repository_is_cloned_once_though_the_worker_that_began_it_died(
    database_url: str, model: Model, launcher: Launcher, host: GitHost
) -> None:
    host.repository("acme/kept")
    settings = {name: str(value) for name, value in host.settings.items()}
    async with clusters.cluster(database_url, model, launcher, sandbox="docker", **settings) as cluster:
        model.reply = lambda request: "done" if request.tool_results else [tool_use("bash", command="cat kept/README.md")]
        await cluster.api()
        worker = cluster.worker("hands.cloned:kill")
        async with cluster.client() as client:
            wanted = {"type": "github_repository", "url": "https://github.com/acme/kept"}
            missing = {"type": "github_repository", "url": "https://github.com/acme/none"}
            session_id = await make_session(client, resources=[wanted, missing])
            async with following(client, session_id) as follower:
                await say(client, session_id, "work")
                assert await worker.ended() == -9
                cluster.worker()
                seen = await follower.idle()
    (result,) = [event["content"][0]["text"] for event in seen if event["type"] == "agent.tool_result"]
    assert result == "acme/kept\n"
    (error,) = [event["error"] for event in seen if event["type"] == "session.error"]
    assert (error["type"], error["repository_url"]) == ("repository_not_found_error", missing["url"])
    assert [path for path, _ in host.seen].count("/acme/kept/info/refs") == 1


@pytest.mark.requirement("SES-100")
async def test_a_clone_is_kept_whole_or_not_at_all_though_the_worker_that_keeps_it_dies(
    database_url: str, model: Model, launcher: Launcher, host: GitHost
) -> None:
    host.repository("acme/large", files={"large": os.urandom(100_000).hex()})
    settings = {name: str(value) for name, value in host.settings.items()}
    gated = "until [ -e go ]; do sleep 0.05; done; git -C large fsck && wc -c < large/large"
    sent: list[int] = []
    async with clusters.cluster(database_url, model, launcher, sandbox="docker", **settings) as cluster:
        model.reply = lambda request: "done" if request.tool_results else [tool_use("bash", command=gated)]
        await cluster.api()
        async with cluster.client() as client:
            for point in ("clone.stored:kill", "clone.recorded:kill", ""):
                worker = cluster.worker(point)
                before = host.sent.get("acme/large", 0)
                wanted = {"type": "github_repository", "url": "https://github.com/acme/large"}
                session_id = await make_session(client, resources=[wanted])
                async with following(client, session_id) as follower:
                    await say(client, session_id, "work")
                    if point:
                        assert await worker.ended() == -9
                        worker = cluster.worker()
                    mine = ("--filter", f"label=managed-agents.session={session_id}", "--filter", "name=^ma-")
                    container = await until(lambda mine=mine: docker("ps", "-q", *mine))
                    assert container is not None
                    uid = await until(
                        lambda container=container: docker("exec", container, "stat", "-c", "%u", "/workspace/large")
                    )
                    assert await docker("exec", "--user", uid or "", container, "touch", "/workspace/go") is not None
                    seen = await follower.idle()
                (result,) = [event["content"][0]["text"] for event in seen if event["type"] == "agent.tool_result"]
                assert result == "200000\n"
                await worker.kill()
                sent.append(host.sent["acme/large"] - before)
    # The first was stored and forgotten, the second recorded.
    assert sent[0] > 100_000
    assert sent[1] > 100_000
    assert sent[2] < 10_000
