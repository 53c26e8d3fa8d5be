"""The egress gateway is killed while a container downloads through it: as a process of its own, and together with its worker.

The download ends with the client's own error; the next one goes through the next gateway, and neither the host nor the container
keeps a socket of the first.
"""

import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic

from managed_agents.processes.worker import installation_of
from managed_agents.scripted_model import Reply, Request, tool_use
from tests.crash.conftest import Finished
from tests.crash.script import Script
from tests.support import cluster as clusters
from tests.support.cluster import Cluster, Model, Node, make_session, say
from tests.support.following import Event, following
from tests.support.launcher import Launcher
from tests.support.waiting import until
from tests.support.websites import website

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

PROXIED = "unset NO_PROXY no_proxy; "
# Slow, so that it is under way for as long as the test needs.
DOWNLOAD = PROXIED + "echo begun >> begun; curl -sSN -m 60 -o got {site}/slow 2>&1; echo status $?; wc -l < begun"
AGAIN = PROXIED + "timeout 30 sh -c 'until curl -sSf -o again {site}/page/text 2>/dev/null; do sleep 0.1; done'; echo status $?"


@pytest.fixture
async def site() -> AsyncIterator[str]:
    async with website() as url:
        yield url.replace("127.0.0.1", "localhost")


@pytest.fixture
async def cluster(database_url: str, model: Model, launcher: Launcher) -> AsyncIterator[Cluster]:
    settings = {"sandbox": "docker", "sandbox_disk_bytes": str(128 * 1024**2), "egress_allowed_networks": "127.0.0.0/8,::1/128"}
    async with clusters.cluster(database_url, model, launcher, **settings) as made:
        yield made


def downloading(site: str) -> Script:
    def reply(request: Request) -> Reply:
        if request.round:
            return "done"
        command = DOWNLOAD if request.last_user_text == "download" else AGAIN
        return [tool_use("bash", command=command.format(site=site))]

    return reply


def container_sockets(cluster: Cluster) -> int:
    """Sockets that processes in the session's container hold."""
    label = f"label=managed-agents.installation={installation_of(cluster.data_dir)}"
    [container] = subprocess.run(
        ("docker", "ps", "-q", "--filter", label), capture_output=True, text=True, timeout=30, check=True
    ).stdout.split()
    listed = subprocess.run(("docker", "top", container, "-eo", "pid"), capture_output=True, text=True, timeout=30, check=True)
    return sum(sockets(int(pid)) for pid in listed.stdout.split()[1:])


def run_sockets(cluster: Cluster) -> int:
    """Sockets in the run directory."""
    return len([path for path in (cluster.data_dir / "run").rglob("*") if path.is_socket()])


def sockets(pid: int) -> int:
    """Sockets that a process holds."""
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            found += str(descriptor.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue
    return found


def results(events: list[Event]) -> list[str]:
    return [event["content"][0]["text"] for event in events if event["type"] == "agent.tool_result"]


async def under_way(cluster: Cluster) -> None:
    """Wait until bytes have come through."""
    await until(lambda: any(path.stat().st_size for path in cluster.data_dir.glob("sandboxes/*/disk/workspace/got")), seconds=30)


async def killed_in_mid_download(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, site: str, gateway: Node, successor: Callable[[], Node]
) -> None:
    """Download, kill the gateway's process, and download again when its successor is there."""
    cluster.model.reply = downloading(site)
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "warm up")
        await follower.idle()
        before = container_sockets(cluster), run_sockets(cluster)
        await say(client, session_id, "download")
        await under_way(cluster)
        await gateway.kill()
        successor()
        await follower.idle(2)
        await say(client, session_id, "again")
        await follower.idle(3)
        warm, broken, again = results(await finished(session_id))
        assert (warm, again) == ("status 0\n", "status 0\n")
        told, status, begun = broken.splitlines()
        assert told.startswith("curl: (")
        assert status.startswith("status ")
        assert status != "status 0"
        assert begun == "1"
        await until(lambda: (container_sockets(cluster), run_sockets(cluster)) == before)


async def test_a_gateway_of_its_own_is_killed_in_mid_download(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, site: str
) -> None:
    cluster.settings["MANAGED_AGENTS_EGRESS"] = "off"
    await cluster.api()
    cluster.worker()
    gateway = cluster.start("egress")
    await killed_in_mid_download(cluster, client, finished, site, gateway, lambda: cluster.start("egress"))


async def test_a_worker_with_the_gateway_is_killed_in_mid_download(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, site: str
) -> None:
    await cluster.api()
    gateway = cluster.worker()
    await killed_in_mid_download(cluster, client, finished, site, gateway, cluster.worker)
