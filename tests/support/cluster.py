"""A whole server to be killed: api and worker processes over one database, local sandboxes, a model in the test's own loop."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
from anthropic import AsyncAnthropic
from pydantic import SecretStr

from managed_agents.db.engine import Database
from managed_agents.encryption.keyring import LocalKeyProvider
from managed_agents.processes.purposes import API_KEYS
from managed_agents.processes.worker import installation_of
from managed_agents.resources.keys import service as keys
from managed_agents.sandbox.docker import DockerBackend
from managed_agents.sandbox.local import LocalBackend
from managed_agents.scripted_model import Reply, Request, Script, create_app
from managed_agents.scripted_model.app import ScriptedModel
from managed_agents.scripted_model.record import Recorder
from tests.support.launcher import Launcher
from tests.support.sandboxes import nothing_known
from tests.support.server import listening
from tests.support.waiting import until

API_KEY = "sk-ma-the-first-key-of-tests"
MODEL = "claude-opus-4-8"
LEASE_TTL_SECONDS = 2.0  # short, but not so short that a busy machine makes a living worker look dead
START_SECONDS_MAX = 40.0
END_SECONDS_MAX = 20.0


@dataclass
class Model:
    """A scripted model whose script the test may change at any time."""

    reply: Callable[[Request], Reply]
    base_url: str = ""
    recorder: Recorder = field(default_factory=Recorder)
    scripted: ScriptedModel | None = None

    def answer(self, request: Request) -> Reply:
        """The script."""
        return self.reply(request)

    def limit_context(self, tokens: int | None) -> None:
        """Pretend that every model's context is this small, to workers that start from now on."""
        assert self.scripted is not None
        self.scripted.script = replace(self.scripted.script, max_input_tokens=tokens)

    async def requests(self, count: int) -> None:
        """Wait until so many requests came."""
        assert await self.recorder.wait(count, None, START_SECONDS_MAX), f"the model was asked only {self.recorder.total} times"


@asynccontextmanager
async def scripted_model(reply: Callable[[Request], Reply]) -> AsyncIterator[Model]:
    """Serve a scripted model in this event loop; `reply` is the script to begin with."""
    made = Model(reply)
    app = create_app(Script("test", made.answer))
    made.scripted = app.state.model
    made.recorder = app.state.model.recorder
    async with listening(app) as made.base_url:
        yield made


@dataclass
class Node:
    """One process."""

    role: str
    pid: int
    log: Path
    _launcher: Launcher

    @property
    def status(self) -> int | None:
        """Exit status, or minus the signal that ended it; None while it lives."""
        return self._launcher.status(self.pid, self.log)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.status is None, f"the {self.role} ended already ({self.status}):\n{self.tail()}"
        os.kill(self.pid, number)

    async def ended(self, *, seconds: float = END_SECONDS_MAX) -> int:
        """Wait for its end and return the status."""
        try:
            await until(lambda: self.status is not None, seconds=seconds)
        except TimeoutError:
            raise AssertionError(f"the {self.role} goes on:\n{self.tail()}") from None
        assert self.status is not None
        return self.status

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        assert await self.ended() == -signal.SIGKILL

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


@dataclass
class Cluster:
    """Processes that share a database, a data directory and a model."""

    database_url: str
    data_dir: Path
    port: int
    model: Model
    launcher: Launcher
    settings: dict[str, str]
    nodes: list[Node] = field(default_factory=list[Node])

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, faults: str = "") -> dict[str, str]:
        """The settings of one process."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MANAGED_AGENTS_", "ANTHROPIC_"))}
        return {**inherited, **self.settings, "MANAGED_AGENTS_FAULTS": faults}

    def start(self, role: str, faults: str = "") -> Node:
        """Start a process; it is not ready yet."""
        log = self.data_dir / f"{role}-{self.port}-{len(self.nodes)}.log"
        node = Node(role, self.launcher.start([role], self.environment(faults), log), log, self.launcher)
        self.nodes.append(node)
        return node

    async def api(self, faults: str = "") -> Node:
        """Start the api process, always at the same address, and wait until it serves."""
        node = self.start("api", faults)

        async def answers() -> bool:
            assert node.status is None, f"the api ended:\n{node.tail()}"
            try:
                async with await anyio.connect_tcp("127.0.0.1", self.port):
                    return True
            except OSError:
                return False

        await until(answers, seconds=START_SECONDS_MAX)
        return node

    @asynccontextmanager
    async def beside(self) -> AsyncIterator["Cluster"]:
        """Run a second api process, at another address, while the block runs; yields the cluster as seen there."""
        port = free_port()
        settings = {**self.settings, "MANAGED_AGENTS_PORT": str(port)}
        other = replace(self, port=port, settings=settings, nodes=[])
        await other.api()
        try:
            yield other
        finally:
            with anyio.CancelScope(shield=True):
                await other.nodes[0].kill()

    def worker(self, faults: str = "") -> Node:
        """Start a worker."""
        return self.start("worker", faults)

    def client(self, **options: Any) -> AsyncAnthropic:
        """The official client: strict about answers, without retries."""
        return AsyncAnthropic(
            base_url=self.base_url,
            api_key=API_KEY,
            timeout=30.0,
            _strict_response_validation=True,
            **{"max_retries": 0, **options},
        )

    def in_workspaces(self, name: str) -> list[Path]:
        """Files of this name in the workspaces of the local sandboxes."""
        return sorted(self.data_dir.glob(f"sandboxes/*/workspace/{name}"))

    async def appeared(self, name: str) -> Path:
        """Wait until a sandbox's workspace has such a file."""
        return (await until(lambda: self.in_workspaces(name)))[0]

    def logs(self) -> str:
        """The ends of all logs, for a failed test's report."""
        return "\n".join(f"--- {node.log.name} ({node.status})\n{node.tail()}" for node in self.nodes)

    async def end(self) -> None:
        """Kill whatever still runs, and remove the sandboxes."""
        for node in self.nodes:
            if node.status is None:
                os.kill(node.pid, signal.SIGKILL)
        for node in self.nodes:
            await node.ended()
        await self._remove_sandboxes()

    async def _remove_sandboxes(self) -> None:
        run_dir = self.data_dir / "run"
        if self.settings["MANAGED_AGENTS_SANDBOX"] == "docker":
            backend = DockerBackend(installation=installation_of(self.data_dir), data_dir=self.data_dir, run_dir=run_dir)
        else:
            # Faster than the backend, which would be polite first. The runner's namespaces end with it.
            for pid in self.data_dir.glob("sandboxes/*/pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid.read_text()), signal.SIGKILL)
            backend = LocalBackend(data_dir=self.data_dir, run_dir=run_dir)
        try:
            await backend.collect_orphans(nothing_known)
        finally:
            await backend.aclose()


@asynccontextmanager
async def cluster(
    database_url: str, model: Model, launcher: Launcher, *, disk: Path | None = None, **settings: str
) -> AsyncIterator[Cluster]:
    """Prepare a cluster with one API key, its data on `disk`; nothing runs yet. Afterwards everything is killed. `settings` win
    over ours.
    """
    # Short, because a socket's path may have 107 bytes; open, because sandboxed commands have uids of their own.
    data_dir = Path(tempfile.mkdtemp(prefix="ma-crash-", dir=disk))
    data_dir.chmod(0o755)
    port = free_port()
    values = {
        "port": str(port),
        "data_dir": str(data_dir),
        "database_url": database_url,
        "sandbox": "local",
        "model_base_url": model.base_url,
        "model_api_key": "scripted",
        "lease_ttl_seconds": str(LEASE_TTL_SECONDS),
        "rate_limits": "off",
        **settings,
    }
    made = Cluster(
        database_url, data_dir, port, model, launcher, {f"MANAGED_AGENTS_{name.upper()}": value for name, value in values.items()}
    )
    db = Database(database_url, pool=1, application_name="tests")
    try:
        hmac_key = LocalKeyProvider(data_dir / "master.key").derive(API_KEYS)
        await keys.bootstrap(db, hmac_key, SecretStr(API_KEY))
    finally:
        await db.dispose()
    try:
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            await made.end()
        print(made.logs(), file=sys.stderr)  # shown when the test failed
        shutil.rmtree(data_dir)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


async def make_session(client: AsyncAnthropic, *, tools: bool | list[Any] = True, **fields: Any) -> str:
    """An environment, an agent and a session of its own; returns the session's id. `tools`: all, none, or these.

    `fields` go into the session's create.
    """
    name = uuid4().hex
    environment = await client.beta.environments.create(
        name=name, config={"type": "cloud", "networking": {"type": "unrestricted"}}
    )
    agent = await client.beta.agents.create(
        name="worker", model=MODEL, tools=tools if isinstance(tools, list) else [{"type": "agent_toolset_20260401"}] * tools
    )
    session = await client.beta.sessions.create(agent=agent.id, environment_id=environment.id, **fields)
    return session.id


async def say(client: AsyncAnthropic, session_id: str, text: str) -> None:
    """Send one message."""
    await client.beta.sessions.events.send(
        session_id, events=[{"type": "user.message", "content": [{"type": "text", "text": text}]}]
    )


async def interrupt(client: AsyncAnthropic, session_id: str) -> None:
    """Send an interrupt."""
    await client.beta.sessions.events.send(session_id, events=[{"type": "user.interrupt"}])


async def history(client: AsyncAnthropic, session_id: str) -> list[dict[str, Any]]:
    """The whole history as JSON, oldest first."""
    listed = client.beta.sessions.events.list(session_id, limit=1000)
    return [event.to_dict(mode="json") async for event in listed]
