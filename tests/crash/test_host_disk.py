"""The host's disk is full: the one that everything of a worker and the api is on, while sessions are in mid-call.

Sandboxes' disks, their sockets, the blob store: each wants room and gets none. Every call still ends, with words for the model;
what was there is kept; and once there is room, made by deleting the session that took it, all goes on without hands.
"""

import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from anthropic import APIStatusError, AsyncAnthropic
from sqlalchemy import text as sql

from managed_agents.sandbox import disk
from managed_agents.sandbox.docker import installation_of
from managed_agents.sandbox.runner.host_disk import LOST
from managed_agents.scripted_model import Reply, Request, tool_use
from tests.conformance.test_sandbox_life import collector
from tests.crash import script
from tests.crash.conftest import Finished
from tests.support import cluster as clusters
from tests.support.cluster import Cluster, Model, make_session, say
from tests.support.following import following
from tests.support.launcher import Launcher
from tests.support.small_disk import MIB, fill, small_disk
from tests.support.stack import BETA, TOOLSET, Stack, Variant, stack
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

RUNNER_SOCKET = "/run/managed-agents/socket/runner.sock"  # as a runner calls it
WAITING = "touch started; until [ -e go ]; do sleep 0.02; done; echo through"
# Nothing of these makes the kernel write: what is lost, is lost after the command has ended well.
FILL = f"{WAITING}; head -c 200M /dev/urandom > fill && echo written"
PREPARE = f"echo kept > kept; head -c {MIB} /dev/urandom > /mnt/session/tool_outputs/report; sync"
LEAVE = "ln /mnt/session/tool_outputs/report /mnt/session/outputs/report && cat kept"


@pytest.fixture
def small_host() -> Iterator[Path]:
    with small_disk(96, "ext4") as directory:
        yield directory


def room(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


@pytest.fixture
def small_data() -> Iterator[Path]:
    with small_disk(16) as directory:
        yield directory


@pytest.fixture
async def cluster(database_url: str, model: Model, launcher: Launcher, small_data: Path) -> AsyncIterator[Cluster]:
    async with clusters.cluster(database_url, model, launcher, disk=small_data) as made:
        yield made


def turns(*commands: str) -> list[Reply]:
    """One command a turn."""
    return [reply for command in commands for reply in ([tool_use("bash", command=command)], "done")]


def results(watch: Any) -> list[str]:
    return [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"]


def traces(server: Stack) -> dict[str, list[str]]:
    """What this server has on the host, by the engine, the kernel and the file system."""

    def lines(*command: str) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()

    directory = server.settings.data_dir
    label = f"label=managed-agents.installation={installation_of(directory)}"
    return {
        "containers": lines("docker", "ps", "-aq", "--filter", label),
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"{directory}/" in line],
        "loops": [line for line in lines("/usr/sbin/losetup", "-a") if f"{directory}/" in line],
        "connections": [peer for peer in unix_peers() if peer == RUNNER_SOCKET],
        "sandboxes": sorted(path.name for path in directory.glob("sandboxes/*")),
        "run": sorted(path.name for path in server.settings.effective_run_dir.glob("*")),
        "drafts": sorted(path.name for path in directory.glob("blobs/drafts/*")),
        "parts": sorted(path.name for path in directory.rglob("*.part")),
    }


def unix_peers() -> Iterator[str]:
    """What the unix sockets of this process, in which the server runs, are connected to."""
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or not connected
            if path.readlink().name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(path.name))) as found:
                    if found.family == socket.AF_UNIX:
                        yield str(found.getpeername())


async def rows(server: Stack, query: str, **values: Any) -> list[Any]:
    async with server.db.transaction() as tx:
        return list((await tx.execute(sql(query), values)).all())


async def stopped(server: Stack, session: Any) -> None:
    """Look until the session's sandbox is stopped."""

    async def rests() -> bool:
        await collector(server).look()
        found = await rows(server, "SELECT state FROM sandboxes WHERE session_id = :id ORDER BY generation DESC", id=session.id)
        return found[0].state == "stopped"

    await until(rests, seconds=60)


async def snapshot_of(server: Stack, session: Any) -> Any:
    return await rows(server, "SELECT sha256, taken_at FROM sandbox_snapshots WHERE session_id = :id", id=session.id)


async def outputs_of(server: Stack, session: Any) -> list[str]:
    listed = server.client.beta.files.list(scope_id=session.id, betas=[BETA])
    return [file.filename async for file in listed]


async def begun(server: Stack, session: Any) -> Any:
    """A handle on the session's sandbox, whose command has begun."""

    async def look() -> Any:
        found = await rows(server, "SELECT id FROM sandboxes WHERE session_id = :id AND state = 'live'", id=session.id)
        if not found:
            return None
        sandbox = await server.backend.attach(found[0].id)
        if any(entry.path == "started" for entry in await sandbox.listing("/workspace", digests=False)):
            return sandbox
        await sandbox.aclose()
        return None

    return await until(look, seconds=60)


if disk.supported():

    @pytest.mark.docker
    async def test_the_hosts_disk_fills_up_under_the_whole_server(postgres_url: str, template: str, small_host: Path) -> None:
        variant = Variant(disk=small_host)
        async with stack(postgres_url, template, sandbox="docker", variant=variant) as server:
            before = traces(server)
            workers = await rows(server, "SELECT id FROM workers")
            filler = await server.session(
                [[tool_use("bash", command=FILL)], [tool_use("bash", command="echo alive")], *turns("echo next")[1:]],
                tools=TOOLSET,
            )
            neighbour = await server.session(turns(PREPARE, WAITING, LEAVE, "cat kept", "echo more"), tools=TOOLSET)
            await server.turn(neighbour)
            await stopped(server, neighbour)
            kept = await snapshot_of(server, neighbour)
            assert len(kept) == 1
            third = await _while_it_is_full(server, filler, neighbour)
            # A snapshot finds no room: the one before stays, and so do the files.
            await stopped(server, neighbour)
            assert await snapshot_of(server, neighbour) == kept
            # What was on the disk before is there; what it lost, if only the times of files, it was told.
            (left,) = results(await server.turn(neighbour))
            assert left.startswith("kept\n")
            assert await outputs_of(server, neighbour) == []
            # Its owner makes room the only way there is.
            await server.check_logs()
            await server.client.beta.sessions.delete(filler.id)
            await collector(server).look()
            await until(lambda: room(small_host) > 64 * MIB)
            assert results(await server.turn(third)) == ["hello\n"]
            (more,) = results(await server.turn(neighbour))
            assert more.startswith("more\n")
            assert await outputs_of(server, neighbour) == ["report"]
            fourth = await server.session(turns("echo fourth"), tools=TOOLSET)
            assert results(await server.turn(fourth)) == ["fourth\n"]
            await server.upload(b"x" * MIB)
            await stopped(server, neighbour)
            assert await snapshot_of(server, neighbour) != kept
            await server.check_logs()
            for session in (neighbour, third, fourth):
                await server.client.beta.sessions.delete(session.id)

            async def gone() -> bool:
                await collector(server).look()
                return not await server.backend.list()

            await until(gone, seconds=60)
            await until(lambda: not traces(server)["connections"])  # closing one takes the event loop a moment
            assert traces(server) == before
            assert await rows(server, "SELECT id FROM workers") == workers


async def _while_it_is_full(server: Stack, filler: Any, neighbour: Any) -> Any:
    """Two sessions in mid-call, of which one fills the disk; a third that begins then, which is returned."""
    async with server.watching(filler) as filling, server.watching(neighbour) as beside:
        for session in (filler, neighbour):
            await server.say(session, "go")
        first, second = await begun(server, filler), await begun(server, neighbour)
        await first.put("/workspace/go", b"", "agent")
        await filling.idle()
        await second.put("/workspace/go", b"", "agent")
        await beside.idle()
        for sandbox in (first, second):
            await sandbox.aclose()
        full, alive = results(filling)
        assert full.startswith("through\nwritten\n")
        assert LOST in full
        assert alive.startswith("alive\n")
        assert results(beside)[0].startswith("through\n")
        assert (await filling.until("agent.tool_result")).is_error
    (left,) = results(await server.turn(neighbour))
    assert left.startswith("kept\n")
    third = await server.session(turns("echo hello", "echo hello"), tools=TOOLSET)
    (refused,) = results(await server.turn(third))
    assert re.search("the disk of its host is full|No space left on device", refused), refused
    assert str(server.settings.data_dir.parent) not in refused
    assert "mkfs" not in refused
    with pytest.raises(APIStatusError) as refusal:
        await server.upload(b"x" * MIB)
    assert refusal.value.status_code == 529
    assert isinstance(refusal.value.body, dict)
    assert refusal.value.body["error"] == {
        "type": "overloaded_error",
        "message": "file: the server's storage is full, try again later",
    }
    assert list(server.settings.data_dir.glob("blobs/drafts/*")) == []
    return third


def working(request: Request) -> Reply:
    """The first command of a session waits for the test; the others say what they find."""
    if request.round:
        return "done"
    return [tool_use("bash", command=script.GATED if request.last_user_text == "work" else "wc -l < side; echo on")]


async def test_a_worker_dies_while_the_disk_is_full(
    cluster: Cluster, client: AsyncAnthropic, small_data: Path, finished: Finished
) -> None:
    cluster.model.reply = working
    await cluster.api()
    worker = cluster.worker()
    early, late = await make_session(client), await make_session(client)
    async with following(client, early) as first, following(client, late) as second:
        await say(client, early, "work")
        side = await cluster.appeared(script.SIDE)
        filler = fill(small_data)
        await worker.kill()
        successor = cluster.worker()
        side.with_name(script.GO).touch()
        await first.idle()
        await say(client, late, "look")
        await second.idle()
        filler.unlink()
        for number, session_id in enumerate((early, late)):
            await say(client, session_id, "look")
            await (first, second)[number].idle(2)
        assert successor.status is None
    said = [
        [event["content"][0]["text"] for event in await finished(each) if event["type"] == "agent.tool_result"]
        for each in (early, late)
    ]
    assert said[0] == ["finished\n", "1\non\n"]  # the call that ran when its worker died ran once
    assert said[1][0] == f"The sandbox could not run this call: {disk.FULL}. Please retry."
    assert said[1][1].endswith("on\n")
    assert not list(small_data.rglob("drafts/*"))
    assert "Traceback" not in successor.log.read_text()
