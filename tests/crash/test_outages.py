"""What sandboxes stand on goes away in the midst of a call: the engine, the container, the worker, the disk.

Each ends with work going on without hands, and with nothing left behind that was not there before. The engine itself is shared,
so what is cut is the socket between it and the worker. `test_engine_restarts.py` kills one of its own.
"""

import errno
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text as sql

from managed_agents.db.engine import Database
from managed_agents.harness.hands import CRASHED
from managed_agents.sandbox import disk
from managed_agents.sandbox.backend import Sandbox, SandboxError
from managed_agents.scripted_model import tool_use
from tests.conformance.test_sandbox_life import collector
from tests.integration.sandbox.contract import MIB, Bench, new_call, text
from tests.support import cluster as clusters
from tests.support.cluster import Model
from tests.support.launcher import Launcher
from tests.support.sandboxes import nothing_known
from tests.support.small_disk import small_disk
from tests.support.stack import TOOLSET, Stack, stack
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

ENGINE = "/var/run/docker.sock"
WAITING = "touch started; until [ -e go ]; do sleep 0.02; done; echo through"


class Engine:
    """A socket that passes on to the engine while it is not cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cut = False
        self._open: set[anyio.abc.SocketStream] = set()

    async def serve(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        listener = await anyio.create_unix_listener(self.path)
        async with listener:
            task_status.started()
            await listener.serve(self._passed_on)

    async def _passed_on(self, client: anyio.abc.SocketStream) -> None:
        if self._cut:
            await client.aclose()
            return
        async with client, await anyio.connect_unix(ENGINE) as engine, anyio.create_task_group() as group:
            self._open |= {client, engine}

            async def copy(source: anyio.abc.SocketStream, target: anyio.abc.SocketStream) -> None:
                with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream, OSError):
                    while True:
                        await target.send(await source.receive())
                group.cancel_scope.cancel()

            group.start_soon(copy, client, engine)
            group.start_soon(copy, engine, client)
        self._open -= {client, engine}

    async def cut(self) -> None:
        """End every connection, and each new one at once."""
        self._cut = True
        for stream in list(self._open):
            await stream.aclose()

    def mend(self) -> None:
        self._cut = False


@asynccontextmanager
async def engine_between(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    """The engine, as a worker of this test reaches it."""
    with tempfile.TemporaryDirectory(prefix="ma-engine-", dir="/tmp") as directory:
        made = Engine(Path(directory) / "docker.sock")
        monkeypatch.setenv("DOCKER_HOST", f"unix://{made.path}")
        async with anyio.create_task_group() as group:
            await group.start(made.serve)
            yield made
            group.cancel_scope.cancel()


async def session_of(server: Stack, *commands: str) -> Any:
    replies: list[Any] = []
    for command in commands:
        replies += [[tool_use("bash", command=command)], "done"]
    return await server.session(replies, tools=TOOLSET)


async def started(server: Stack, session: Any, mark: str) -> Sandbox:
    """Wait until the session's command has made its mark; returns a handle on its sandbox."""
    found: list[Sandbox] = []

    async def there() -> bool:
        if not found:
            async with server.db.transaction() as tx:
                query = sql("SELECT id FROM sandboxes WHERE session_id = :id AND state = 'live'")
                sandbox_id: str | None = (await tx.execute(query, {"id": session.id})).scalar_one_or_none()
            if sandbox_id is None:
                return False
            found.append(await server.backend.attach(sandbox_id))
        return any(entry.path == mark for entry in await found[0].listing("/workspace"))

    await until(there, seconds=60)
    return found[0]


def results(watch: Any) -> list[str]:
    return [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"]


def engine_holds(server: Stack) -> set[str]:
    """Names of the containers of this server, by the engine itself."""
    names = subprocess.run(
        ("docker", "-H", f"unix://{ENGINE}", "ps", "-a", "--format", "{{.Names}} {{.Labels}}"),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return {line.split()[0] for line in names.stdout.splitlines() if _installation(server) in line}


def _installation(server: Stack) -> str:
    from managed_agents.processes.worker import installation_of

    return f"managed-agents.installation={installation_of(server.settings.data_dir)}"


async def test_the_engine_and_then_a_container_go_away_in_mid_call(
    postgres_url: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_between(monkeypatch) as engine, stack(postgres_url, template, sandbox="docker") as server:
        try:
            await _outages(server, engine)
        finally:
            engine.mend()


async def _outages(server: Stack, engine: Engine) -> None:
    running = await session_of(server, WAITING, "touch again; sleep 300", "echo kept > f; cat f")
    other = await session_of(server, "echo first", "echo second")
    async with server.watching(running) as watch, server.watching(other) as beside:
        await server.say(running, "go")
        sandbox = await started(server, running, "started")
        await engine.cut()
        # A call that runs needs no engine; a new sandbox does, and its session says what is wrong.
        await server.say(other, "go")
        await beside.idle()
        assert "could not run this call: the engine does not answer" in results(beside)[0]
        await sandbox.put("/workspace/go", b"", "agent")
        await watch.idle()
        assert results(watch) == ["through\n"]
        engine.mend()
        await server.say(other, "again")
        await beside.idle(count=2)
        assert results(beside)[1] == "second\n"
        # Now the container, by a hand from outside.
        await server.say(running, "again")
        second = await started(server, running, "again")
        name = f"ma-{_installation(server).partition('=')[2]}-{sandbox.id}.{sandbox.generation}"
        assert second.id == sandbox.id
        await anyio.run_process(["docker", "-H", f"unix://{ENGINE}", "kill", name])
        await watch.idle(count=2)
        assert results(watch)[1] == CRASHED
        for handle in (sandbox, second):
            await handle.aclose()
        await server.say(running, "once more")
        await watch.idle(count=3)
        assert results(watch)[2].endswith("kept\n")
    assert len(engine_holds(server)) == 3
    with anyio.fail_after(30):
        await server.collector.look()
    assert len(engine_holds(server)) == 2  # one a session: what was lost is gone
    for session in (running, other):
        await server.client.beta.sessions.delete(session.id)
    await _gone(server)
    assert engine_holds(server) == set()
    assert list((server.settings.data_dir / "sandboxes").iterdir()) == []
    assert list(server.settings.effective_run_dir.iterdir()) == []
    assert str(server.settings.data_dir) not in Path("/proc/self/mounts").read_text()


async def _gone(server: Stack) -> None:
    mine = collector(server, idle_seconds=300.0)

    async def empty() -> bool:
        await mine.look()
        return not await server.backend.list()

    await until(empty, seconds=60)


@pytest.fixture
def small_host() -> Iterator[Path]:
    with small_disk(48) as directory:
        yield directory


if disk.supported():

    async def test_the_hosts_disk_fills_up_in_mid_call(small_host: Path) -> None:
        bench = Bench("docker", small_host, f"full{small_host.name}")
        backend = bench.backend()
        sandbox = await backend.provision(bench.spec(disk_bytes=256 * MIB))
        neighbour = await backend.provision(bench.spec(disk_bytes=256 * MIB))
        before = bench.traces()
        try:
            with anyio.fail_after(60):
                fill = "head -c 120000000 /dev/urandom > /workspace/fill; sync /workspace/fill"
                full = await sandbox.execute(new_call("bash", command=fill))
                assert full.is_error
                assert "rror" in text(full)
                # No room for the journal, either: a call is refused as busy or answered, but never lost in silence.
                for _ in range(3):
                    with suppress(SandboxError):
                        await neighbour.execute(new_call("bash", command="echo alive"))
                with pytest.raises((SandboxError, OSError)) as refused:
                    await backend.provision(bench.spec(disk_bytes=256 * MIB))
                if isinstance(refused.value, OSError):
                    assert refused.value.errno == errno.ENOSPC
                await sandbox.destroy()
                await sandbox.aclose()
                # There is room again, and the neighbour goes on without hands.
                assert text(await neighbour.execute(new_call("bash", command="echo alive"))) == "alive\n"
                third = await backend.provision(bench.spec(disk_bytes=256 * MIB))
                assert text(await third.execute(new_call("bash", command="echo new"))) == "new\n"
                known = {(each.id, each.generation) for each in (neighbour, third)}

                async def these() -> set[tuple[str, int]]:
                    return known

                await backend.collect_orphans(these)
                after = bench.traces()
                assert {kind: len(found) for kind, found in after.items()} == {kind: len(found) for kind, found in before.items()}
                for handle in (neighbour, third):
                    await handle.aclose()
        finally:
            await backend.collect_orphans(nothing_known)
            await backend.aclose()
        assert not any(left for kind, left in bench.traces().items() if kind != "mounts")


@pytest.mark.parametrize("point", ["pool.recorded", "pool.made"])
async def test_a_worker_that_dies_filling_the_pool_leaves_nothing_unknown(
    database_url: str, model: Model, launcher: Launcher, db: Database, point: str
) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        async with clusters.cluster(database_url, model, launcher, sandbox_environments=file.name) as cluster:
            await cluster.api()
            client: AsyncAnthropic = cluster.client()
            environment = await client.beta.environments.create(name="pooled", config={"type": "cloud"})
            await client.close()
            file.write(f"[{environment.id}]\npool = 2\n")
            file.flush()
            assert await cluster.worker(f"{point}:kill").ended() == -9
            cluster.worker()

            async def rows() -> list[Any]:
                async with db.transaction() as tx:
                    return list((await tx.execute(sql("SELECT id, ready FROM pooled_sandboxes"))).all())

            async def filled() -> bool:
                return [row.ready for row in await rows()].count(True) == 1 and len(await rows()) == 2

            await until(filled, seconds=60)
            made = {path.name.rpartition(".")[0] for path in (cluster.data_dir / "sandboxes").iterdir()}
            assert made <= {row.id for row in await rows()}
