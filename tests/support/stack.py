"""The whole server in the test's own event loop: API, worker, hands and scripted model, laid out as its processes are.

The API and the worker have engines, hubs and doorbells of their own and meet in Postgres only; the API and the model are
reached over real sockets, the API through the official SDK. One stack serves many tests: each test makes an agent whose
script is its own, so tests that share a stack do not see each other.
"""

import json
import os
import re
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import anyio
import anyio.lowlevel
import httpx
from anthropic import AsyncAnthropic
from pydantic import SecretStr
from sqlalchemy import text

from managed_agents import scripted_model
from managed_agents.api.app import create_app
from managed_agents.blobstore.local import LocalBlobStore
from managed_agents.core.settings import Settings
from managed_agents.db import databases
from managed_agents.db.engine import Database
from managed_agents.db.listener import KEYS_CHANNEL, LOG_CHANNEL, Doorbell, listen
from managed_agents.encryption.sealing import Sealer
from managed_agents.eventlog import interest
from managed_agents.eventlog.batch import Appender
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.previews import PREVIEW_CHANNEL, PreviewSender
from managed_agents.eventlog.subscribe import Hub
from managed_agents.harness.brain import STANDARD, Harness, StandardHarness
from managed_agents.harness.hands import Hands
from managed_agents.harness.loop import Parts
from managed_agents.harness.request import ModelRequester
from managed_agents.harness.worker import Worker
from managed_agents.model.client import AnthropicModelClient, Deadlines
from managed_agents.model.endpoint import Endpoint
from managed_agents.model.models import Models
from managed_agents.processes.purposes import SECRETS
from managed_agents.processes.sandboxes import sandbox_plan
from managed_agents.processes.settings import key_provider
from managed_agents.processes.worker import sandbox_backend, web_tools
from managed_agents.reconcilers.sandbox_collector import SandboxCollector
from managed_agents.reconcilers.session_eraser import erase_deleted
from managed_agents.resources.keys.service import KeyDirectory
from managed_agents.resources.services import Services
from managed_agents.resources.sessions.events_service import SessionEvents
from managed_agents.resources.sessions.service import Sessions
from managed_agents.sandbox.backend import SandboxBackend
from managed_agents.scripted_model.record import Recorder
from tests.support.invariants import check_history, check_rows
from tests.support.sandboxes import nothing_known
from tests.support.server import HMAC_KEY, Caller, listening, make_caller, sdk
from tests.support.waiting import until
from tests.support.watch import WAIT_SECONDS, Watch

MODEL = "claude-opus-5"
BETA = "managed-agents-2026-04-01"
TOOLSET: list[dict[str, Any]] = [{"type": "agent_toolset_20260401"}]
SCRIPT = re.compile(r"script-[0-9a-f]{12}")

_RESTING = text(
    "SELECT id, owner IS NULL AND inbox_count = 0 AND handled_seq = input_seq AS rests FROM sessions WHERE deleted_at IS NULL"
)

Request = scripted_model.Request
Reply = Any


class ScriptedReplies:
    """What the model says, by the script name in the agent's system prompt: a function, or replies in order.

    `otherwise` answers agents that name none.
    """

    def __init__(self) -> None:
        self._scripts: dict[str, Callable[[Request], Reply]] = {}
        self.otherwise: Callable[[Request], Reply] | None = None
        self.seen: dict[str, list[Request]] = {}

    def add(self, replies: Callable[[Request], Reply] | Sequence[Reply]) -> str:
        """Keep a script and return its name. A list is used up in order; beyond its end the model says "done"."""
        name = f"script-{uuid4().hex[:12]}"
        if callable(replies):
            self._scripts[name] = replies
        else:
            waiting = deque(replies)
            self._scripts[name] = lambda _request: waiting.popleft() if waiting else "done"
        self.seen[name] = []
        return name

    def __call__(self, request: Request) -> Reply:
        # A request that judges a call quotes the agent's instructions instead.
        found = SCRIPT.search(request.system) or SCRIPT.search(request.user_texts[0])
        if found is None:
            assert self.otherwise is not None, "every agent of these tests names its script"
            return self.otherwise(request)
        self.seen[found[0]].append(request)
        return self._scripts[found[0]](request)


@dataclass
class Gate:
    """A command that runs until the test lets it through: for what must happen while a tool is running."""

    directory: Path

    @property
    def command(self) -> str:
        """Says that it started, waits, and prints `through`."""
        return f"touch {self.directory}/started; until [ -e {self.directory}/open ]; do sleep 0.02; done; echo through"

    async def started(self) -> None:
        """Wait until the command runs."""
        await until((self.directory / "started").exists, seconds=WAIT_SECONDS)

    def open(self) -> None:
        """Let the command finish."""
        (self.directory / "open").touch()


@dataclass
class Stack:
    """A running server and everything a test needs of it."""

    base_url: str
    db: Database
    caller: Caller
    other: Caller
    client: AsyncAnthropic
    stranger: AsyncAnthropic
    http: httpx.AsyncClient
    replies: ScriptedReplies
    backend: SandboxBackend
    blobs: LocalBlobStore
    collector: SandboxCollector
    environment_id: str
    recorder: Recorder
    settings: Settings

    async def agent(self, replies: Callable[[Request], Reply] | Sequence[Reply] = (), **fields: Any) -> Any:
        """An agent that answers as `replies` say; it has no tools unless `tools` are given."""
        return await self.client.beta.agents.create(
            name=fields.pop("name", "tester"), model=fields.pop("model", MODEL), system=self.replies.add(replies), **fields
        )

    async def session(self, replies: Callable[[Request], Reply] | Sequence[Reply] = (), **fields: Any) -> Any:
        """A session of a new agent. `tools`, `model` and the fields in `agent` go to that, all else into the session's create."""
        agent = await self.agent(
            replies, **fields.pop("agent", {}), **{k: fields.pop(k) for k in ("tools", "model") if k in fields}
        )
        return await self.client.beta.sessions.create(agent=agent.id, environment_id=self.environment_id, **fields)

    def requests(self, session: Any) -> list[Request]:
        """Every request that the model got for the session's script."""
        found = SCRIPT.search(session.agent.system)
        assert found is not None
        return self.replies.seen[found[0]]

    async def say(self, session: Any, *texts: str) -> Any:
        """Send one user message per text, in one request."""
        return await self.client.beta.sessions.events.send(session.id, events=[message(text) for text in texts])

    @asynccontextmanager
    async def watching(self, session: Any, **query: Any) -> AsyncIterator[Watch]:
        """Read the session's stream through the SDK while the block runs."""
        watch = Watch()
        opening = self.client.beta.sessions.events.stream(session.id, **query)
        async with await opening as stream, anyio.create_task_group() as group:

            async def read() -> None:
                async for event in stream:
                    watch.add(event)
                watch.end()

            group.start_soon(read)
            yield watch
            group.cancel_scope.cancel()

    async def turn(self, session: Any, text: str = "go") -> Watch:
        """Run one turn to its idle; returns what was streamed."""
        async with self.watching(session) as watch:
            await self.say(session, text)
            await watch.idle()
        return watch

    async def history(self, session: Any, **query: Any) -> list[Any]:
        """The whole history through the SDK."""
        return [event async for event in self.client.beta.sessions.events.list(session.id, **query)]

    async def idle(self, session: Any) -> Any:
        """Poll until the session is idle; returns it."""

        async def look() -> Any:
            found = await self.client.beta.sessions.retrieve(session.id)
            return found if found.status == "idle" else None

        return await until(look, seconds=WAIT_SECONDS)

    def headers(self, *, without: str = "", **more: str) -> dict[str, str]:
        """What a complete raw request carries."""
        complete = {
            "x-api-key": self.caller.secret,
            "anthropic-version": "2023-06-01",
            "anthropic-beta": BETA,
            "content-type": "application/json",
        }
        complete |= {name.replace("_", "-"): value for name, value in more.items()}
        complete.pop(without, None)
        return complete

    async def raw(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request as written; `headers` replace the complete ones."""
        options.setdefault("headers", self.headers())
        return await self.http.request(method, path, **options)

    async def refused(self, method: str, path: str, *, status: int = 400, **options: Any) -> str:
        """Send a raw request, check that it is refused in the envelope, and return the message."""
        answer = await self.raw(method, path, **options)
        return refusal(answer, status=status)

    async def upload(self, content: bytes = b"hello", name: str = "data.txt") -> Any:
        """An uploaded file."""
        return await self.client.beta.files.upload(file=(name, content, "text/plain"))

    async def check_logs(self) -> None:
        """Check every log that the tests left behind against what holds for any log."""

        session_ids: list[str] = []

        async def resting() -> bool:
            async with self.db.transaction() as tx:
                rows = (await tx.execute(_RESTING)).all()
            session_ids[:] = [row.id for row in rows]
            return all(row.rests for row in rows)

        await until(resting, seconds=WAIT_SECONDS)
        for session_id in session_ids:
            events = [json.loads(row) for row in await self._bodies(session_id)]
            check_history(events, at_rest=False)
            await check_rows(self.db, session_id, events)

    async def _bodies(self, session_id: str) -> list[bytes]:
        async with self.db.transaction() as tx:
            rows = await tx.execute(text("SELECT body FROM events WHERE session_id = :id ORDER BY seq"), {"id": session_id})
            return [row.body for row in rows]

    async def reconcile(self) -> None:
        """Let the reconcilers of a worker look once."""
        await self.collector.look()
        await erase_deleted(self.db)


def message(text: str) -> Any:
    """A user message of one text block."""
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


def refusal(answer: httpx.Response, *, status: int = 400) -> str:
    """Check the shape of a refusal and return its message."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text[:500]}"
    body = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert body["type"] == "error"
    assert set(body) == {"type", "error", "request_id"}
    assert {"type", "message"} <= set(body["error"]) <= {"type", "message", "details"}
    assert body["request_id"] == answer.headers["request-id"]
    return body["error"]["message"]


def _kill_runners(directory: Path) -> None:
    """End the `local` sandboxes at once; asking them to end takes seconds each."""
    for pid in directory.glob("sandboxes/*/pid"):
        with suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


@contextmanager
def gate() -> Iterator[Gate]:
    """A gate in a directory that commands of any uid can reach."""
    directory = Path(tempfile.mkdtemp(prefix="ma-gate-"))
    directory.chmod(0o777)
    made = Gate(directory)
    try:
        yield made
    finally:
        made.open()
        shutil.rmtree(directory)


@asynccontextmanager
async def _straight(base_url: str) -> AsyncIterator[str]:
    yield base_url


def sealer(settings: Settings) -> Sealer:
    """What the processes of these settings seal secrets with."""
    return Sealer(key_provider(settings), SECRETS)


@dataclass(frozen=True)
class Variant:
    """What may differ between stacks: the model's context, what stands before it, how long it may be silent, more harnesses,
    other settings, the disk its data is on.
    """

    context_tokens: int | None = None
    before_model: Callable[[str], AbstractAsyncContextManager[str]] = _straight
    deadlines: Deadlines | None = None
    harnesses: Mapping[str, Harness] = field(default_factory=dict[str, Harness])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    disk: Path = Path("/tmp")


@asynccontextmanager
async def stack(
    postgres_url: str, template: str, *, sandbox: Literal["local", "docker"] = "local", variant: Variant | None = None
) -> AsyncIterator[Stack]:
    """Start everything on a database of its own; stop it and remove what it left behind."""
    name = f"test_{uuid4().hex[:12]}"
    variant = variant or Variant()
    # Short, because sockets are made below it, and open to the uids of commands.
    directory = Path(tempfile.mkdtemp(prefix="ma-", dir=variant.disk))
    os.chmod(directory, 0o755)
    try:
        database_url = await databases.create_database(postgres_url, name, template)
        async with _running(database_url, directory, sandbox, variant) as running:
            yield running
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(WAIT_SECONDS):
            await databases.drop_database(postgres_url, name)
        shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def _running(
    database_url: str, directory: Path, sandbox: Literal["local", "docker"], variant: Variant
) -> AsyncIterator[Stack]:
    replies = ScriptedReplies()
    model = scripted_model.create_app(scripted_model.Script("test", replies, variant.context_tokens))
    settings = Settings(
        database_url=SecretStr(database_url),
        data_dir=directory,
        sandbox=sandbox,
        sandbox_memory_bytes=512 * 1024**2,
        sandbox_disk_bytes=256 * 1024**2,
        **variant.settings,
    )
    api_db = Database(database_url, pool=10, application_name="test api")
    worker_db = Database(database_url, pool=10, application_name="test worker")
    async with listening(model) as listening_url, variant.before_model(listening_url) as model_url:
        endpoint = Endpoint(model_url, SecretStr("no-key"), is_real_api=False, is_loopback=True)
        client = AnthropicModelClient(endpoint, deadlines=variant.deadlines)
        backend = sandbox_backend(settings, endpoint)
        blobs = LocalBlobStore(directory / "blobs")
        try:
            hub, doorbell = Hub(api_db), Doorbell(database_url)
            hints = Hints(hub, doorbell)
            services = Services(
                db=api_db,
                keys=KeyDirectory(api_db, HMAC_KEY),
                blobs=blobs,
                sessions=Sessions(api_db, hints, sealer(settings), web_search=settings.web_search is not None),
                events=SessionEvents(api_db, hints, hub),
                web_search=settings.web_search is not None,
            )
            worker_doorbell = Doorbell(database_url)
            previews = PreviewSender(database_url)
            appender = Appender(worker_db, Hints(Hub(worker_db), worker_doorbell).appended)
            parts = Parts(
                db=worker_db,
                appender=appender,
                requester=ModelRequester(client, Models(client.anthropic)),
                hands=Hands(
                    worker_db,
                    backend,
                    blobs,
                    sandbox_plan(settings).spec,
                    settings.effective_host_name,
                    settings.sandbox_image,
                    running_max=settings.sandbox_running_max,
                    wait_seconds=settings.sandbox_wait_seconds,
                    clones_bytes_max=settings.repository_cache_bytes,
                ),
                harnesses={STANDARD: StandardHarness(), **variant.harnesses},
                previews=previews,
                web=web_tools(settings, client),
                jitter=lambda: 0.0,
            )
            worker = Worker(parts, turns_max=100, ttl_seconds=15.0)
            caller, other = await make_caller(api_db, "mine"), await make_caller(api_db, "theirs")
            async with anyio.create_task_group() as group:
                group.start_soon(doorbell.run)
                group.start_soon(worker_doorbell.run)
                group.start_soon(previews.run)
                group.start_soon(hub.run)
                await group.start(appender.run)
                heard = anyio.Event()

                async def connected() -> None:
                    await hub.refresh_all()
                    heard.set()

                group.start_soon(listen, database_url, {LOG_CHANNEL: hub.refresh, KEYS_CHANNEL: services.keys.forget}, connected)
                previewed = anyio.Event()

                async def previews_heard() -> None:
                    previewed.set()

                group.start_soon(listen, database_url, {PREVIEW_CHANNEL: hub.publish_previews}, previews_heard)
                group.start_soon(interest.keep, api_db, hub.previewed)
                group.start_soon(worker.run)
                with anyio.fail_after(WAIT_SECONDS):
                    await heard.wait()
                    await previewed.wait()
                async with (
                    listening(create_app(services)) as base_url,
                    sdk(base_url, caller) as mine,
                    sdk(base_url, other) as theirs,
                    httpx.AsyncClient(base_url=base_url, timeout=30.0) as http,
                ):
                    environment = await mine.beta.environments.create(name="test", config={"type": "cloud"})
                    yield Stack(
                        base_url,
                        api_db,
                        caller,
                        other,
                        mine,
                        theirs,
                        http,
                        replies,
                        backend,
                        blobs,
                        SandboxCollector(
                            worker_db,
                            backend,
                            blobs,
                            host=settings.effective_host_name,
                            pause_seconds=60.0,
                            idle_seconds=300.0,
                            parked_seconds=3600.0,
                        ),
                        environment.id,
                        model.state.model.recorder,
                        settings,
                    )
                    hub.close()
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(WAIT_SECONDS):
                _kill_runners(directory)
                await backend.collect_orphans(nothing_known)
                await client.aclose()
                await backend.aclose()
                await worker_db.dispose()
                await api_db.dispose()
