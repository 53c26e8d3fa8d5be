"""A session in a real database, for a state machine: the API's services, the harness's runners, appends, claims and streams.

Two threads with an event loop each stand for two machines: one runs the API's commands and a stream, one the workers. A worker is
what a worker process is to the database (a row, an appender, a runner) and stops before each of its steps until the test lets it
take the next one. While it takes one, a named fault point can end it, or let the API's thread act at just that moment. The model
is the scripted one over HTTP. The database's own clock jumps: its search path has `clock_timestamp()` of its own.
"""

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import anyio
import orjson
from anyio.abc import TaskGroup
from anyio.from_thread import BlockingPortal
from pydantic import SecretStr
from sqlalchemy import text

from managed_agents import scripted_model
from managed_agents.blobstore.local import LocalBlobStore
from managed_agents.core import faults, ids, limits
from managed_agents.core.errors import InvalidRequest
from managed_agents.core.ids import SessionId, WorkspaceId
from managed_agents.core.settings import Settings
from managed_agents.db.connection import connect
from managed_agents.db.engine import Database
from managed_agents.db.listener import Doorbell
from managed_agents.eventlog.batch import Appender
from managed_agents.eventlog.head import Head
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.previews import PreviewSender
from managed_agents.eventlog.subscribe import PING, Hub
from managed_agents.harness import lease
from managed_agents.harness.brain import STANDARD, StandardHarness
from managed_agents.harness.hands import Hands
from managed_agents.harness.loop import Parts, SessionRunner
from managed_agents.harness.request import ModelRequester
from managed_agents.harness.tools.web import WebTools
from managed_agents.harness.tools.web_search import ONE_SEARCH, Answer, Found
from managed_agents.harness.worker import Worker
from managed_agents.model.client import AnthropicModelClient
from managed_agents.model.endpoint import Endpoint
from managed_agents.model.models import Models
from managed_agents.processes.sandboxes import sandbox_plan
from managed_agents.processes.worker import sandbox_backend, web_tools
from managed_agents.resources.sessions.events_service import SessionEvents
from managed_agents.resources.sessions.schemas import ListEvents, SendEvents, UpdateSession
from managed_agents.resources.sessions.service import Sessions
from tests.support import sessions
from tests.support.invariants import check_history, check_rows
from tests.support.server import SEALER, listening

Json = dict[str, Any]

STEP_SECONDS_MAX = 30.0
SECRET = "sk-the-model-s-key"
TTL_SECONDS = 1e9
_CLOCK = """
    CREATE SCHEMA jump;
    CREATE TABLE jump.clock (seconds float8 NOT NULL);
    INSERT INTO jump.clock VALUES (0);
    CREATE FUNCTION jump.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
        'SELECT pg_catalog.clock_timestamp() + make_interval(secs => (SELECT seconds FROM jump.clock))';
    DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = jump, pg_catalog, public', current_database()); END $$;
"""


class Somewhere:
    """A search engine that always finds the same."""

    asks_model: ClassVar[bool] = False

    async def search(self, query: str, config: Json, agent: Any) -> Answer:
        return Answer([Found("https://example.com/", "Example", query)], ONE_SEARCH)


class Stepped(SessionRunner):
    """The real runner, which waits to be let on before each step."""

    async def _step(self) -> bool:
        await self.turnstile()
        return await super()._step()

    turnstile: Callable[[], Any]


class Process:
    """One worker process and the session it claimed: alone with what it remembers."""

    def __init__(self, server: "Server", claim: lease.Claim, worker_id: str, heads: list[tuple[Head, str]]) -> None:
        self._server = server
        self.claim = claim
        self.id = worker_id
        self.ended = False
        self.killed = False
        self._arrived = anyio.Event()
        self._permit = anyio.Event()
        self._appender = Appender(server.worker_db, server.worker_hints.appended)
        self._appender.know(heads)
        self.runner: Any = None

    async def run(self) -> None:
        """Live until the runner ends, or somebody kills it."""
        server = self._server
        try:
            async with anyio.create_task_group() as group:
                await group.start(self._appender.run)
                worker = Worker(server.parts(self._appender), turns_max=1, ttl_seconds=TTL_SECONDS)
                self.runner = await worker._runner(self.claim, self.id)
                if isinstance(self.runner, SessionRunner):
                    self.runner.__class__ = Stepped
                    self.runner.turnstile = self._pass
                await worker._run_supervised(self.runner, self.id)
                group.cancel_scope.cancel()
        except* faults.FaultInjected:
            self.killed = True
        finally:
            faults.disarm()
            self.ended = True
            self._arrived.set()

    async def _pass(self) -> None:
        self._permit = anyio.Event()
        self._arrived.set()
        await self._permit.wait()

    async def step(self) -> None:
        """Let it take its next step; returns when that is done or the process has ended."""
        with anyio.fail_after(STEP_SECONDS_MAX):
            await self._arrived.wait()
            if not self.ended:
                self._arrived = anyio.Event()
                self._permit.set()
                await self._arrived.wait()


@dataclass
class Server:
    """The database and both sides of it."""

    url: str
    api_db: Database
    worker_db: Database
    hub: Hub
    api: Sessions
    events: SessionEvents
    worker_hints: Hints
    shared: Parts
    group: TaskGroup
    workspace_id: WorkspaceId
    model: "Model"

    def parts(self, appender: Appender) -> Parts:
        """What a worker process shares, with an appender of its own."""
        shared = self.shared
        return Parts(
            shared.db,
            appender,
            shared.requester,
            shared.hands,
            shared.harnesses,
            shared.previews,
            shared.web,
            shared.jitter,
        )

    async def claim(self, session_id: str) -> Process | None:
        """Register a worker that claims the session, where it can be claimed."""
        worker_id = ids.new_id(ids.WORKER)
        async with self.worker_db.autocommit() as tx:
            await tx.execute(text("INSERT INTO workers (id, host, pid) VALUES (:id, 'here', 1)"), {"id": worker_id})
            claims, heads = await lease.claim(tx, worker_id, limit=1, session_ids=[session_id])
        if not claims:
            return None
        process = Process(self, claims[0], worker_id, heads)
        self.group.start_soon(process.run)
        return process

    async def free(self) -> None:
        """What the other workers do when a worker's sign of life is missing."""
        async with self.worker_db.autocommit() as tx:
            await lease.free_dead(tx, ttl_seconds=TTL_SECONDS)

    async def free_elsewhere(self) -> None:
        """The same, by a worker on the API's machine."""
        async with self.api_db.autocommit() as tx:
            await lease.free_dead(tx, ttl_seconds=TTL_SECONDS)

    async def jump(self, seconds: float) -> None:
        """The database's clock jumps, back too."""
        async with self.api_db.transaction() as tx:
            await tx.execute(text("UPDATE jump.clock SET seconds = seconds + :by"), {"by": seconds})


@dataclass
class Model:
    """What the scripted model answers next."""

    reply: Any = "Done."
    asked: int = 0

    def answer(self, request: scripted_model.Request) -> Any:
        self.asked += 1
        return self.reply


@dataclass
class Stream:
    """Everything that one subscriber got."""

    events: list[Json] = field(default_factory=list[Json])
    ended: bool = False

    async def read(self, hub: Hub, session_id: str, thread_id: str) -> None:
        async with aclosing(hub.subscribe(session_id, thread_id, seq=0, inbox_seq=0)) as frames:
            async for chunk in frames:
                parts = [part for part in chunk.split(b"\n\n") if part and part + b"\n\n" != PING]
                self.events += [orjson.loads(part.split(b"\ndata: ", 1)[1]) for part in parts]
        self.ended = True

    @property
    def logged(self) -> list[Json]:
        """Without the null copies of what was waiting."""
        return [event for event in self.events if event["processed_at"] is not None]


@dataclass
class Session:
    """One session, for the test's thread."""

    server: Server
    api_portal: BlockingPortal
    worker_portal: BlockingPortal
    id: SessionId
    thread_id: str
    stream: Stream
    processes: list[Process] = field(default_factory=list[Process])
    row: Any = None  # as last read; None when it has changed since
    logged: list[Json] = field(default_factory=list[Json])

    # The client

    def send(self, *events: Json) -> bool:
        """One request; False when it was refused, and then it has left nothing."""
        return self._command(
            lambda: self.server.events.send(self._workspace, self.id, _parsed(SendEvents, {"events": list(events)}))
        )

    def update(self, **fields: Any) -> bool:
        """One update; False when it was refused."""
        return self._command(lambda: self.server.api.update(self._workspace, self.id, _parsed(UpdateSession, fields)))

    def archive(self) -> bool:
        """Archive; False when it was refused."""
        return self._command(lambda: self.server.api.archive(self._workspace, self.id))

    def _command(self, call: Callable[[], Any]) -> bool:
        async def run() -> None:
            await call()

        before = self.row or self.api_portal.call(self.rows)
        try:
            self.api_portal.call(run)
        except InvalidRequest:
            after = self.api_portal.call(self.rows)
            assert after == before, "a refused request left something"
            return False
        self.row = None
        return True

    @property
    def _workspace(self) -> WorkspaceId:
        return self.server.workspace_id

    # Workers

    def claim(self) -> Process | None:
        """A worker looks for work, later than any delay; the sessions of the dead were freed before."""
        self.row = None
        if not self.processes:
            self.worker_portal.call(self.server.free)
        process = self.worker_portal.call(self.server.claim, self.id)
        if process is not None:
            self.processes.append(process)
        return process

    def lose_lease(self) -> None:
        """The owner looks dead to the others, and does not know."""
        self.row = None
        self.worker_portal.call(self.server.free)

    def step(self, process: Process, point: str | None = None, happens: Callable[[], None] | None = None) -> None:
        """Let a worker take one step. At fault point `point` something `happens`; without that, the worker dies there."""

        async def run() -> None:
            if point is not None:
                faults.arm(point, "raise" if happens is None else lambda: self._meanwhile(process, happens))
            try:
                await process.step()
            finally:
                faults.disarm()

        before = self.api_portal.call(self.rows)
        self.row = None
        stale = before.owner != process.id or before.epoch != process.claim.epoch
        self.worker_portal.call(run)
        if stale and happens is None:
            after = self.api_portal.call(self.rows)
            assert after == before, "who lost the lease has written"
        if process.ended:
            self.processes.remove(process)

    def _meanwhile(self, process: Process, happens: Callable[[], None]) -> None:
        faults.disarm()
        happens()
        if process.runner is not None:
            process.runner.notify()

    def kill(self, process: Process) -> None:
        """It is gone, between two steps."""
        self.row = None
        self.processes.remove(process)
        self.worker_portal.call(self._abandon, process)

    async def _abandon(self, process: Process) -> None:
        await self.server.free()
        await process.step()  # it may do no more than find out

    # What holds at any time

    async def rows(self) -> Any:
        """The row that every write touches."""
        async with self.server.api_db.autocommit() as tx:
            columns = "owner, epoch, input_seq, handled_seq, due_at, last_seq, last_inbox_seq, inbox_count, status, crashes"
            found = await tx.execute(text(f"SELECT {columns}, title, metadata FROM sessions WHERE id = :id"), {"id": self.id})
            return found.one()

    def history(self) -> list[Json]:
        """The history as the API lists it."""
        return self.api_portal.call(self._history)

    async def _history(self) -> list[Json]:
        page = await self.server.events.page(self._workspace, self.id, ListEvents.model_validate({"limit": 1000}))
        answer = orjson.loads(page)
        assert answer["next_page"] is None
        return answer["data"]

    def check(self, *, at_rest: bool = False) -> list[Json]:
        """Check every promise, where anything has changed; returns the history."""
        row = self.api_portal.call(self.rows)
        if row == self.row and not at_rest:
            return self.logged
        self.row = row
        listed = self.history()
        logged = [event for event in listed if event["processed_at"] is not None]
        assert listed[: len(logged)] == logged, "what waits comes behind the log"
        types = [event["type"] for event in logged]
        if "session.status_terminated" in types:
            assert types[-1] == "session.status_terminated", "terminated stays terminated"
            at_rest = False
        else:
            # Behind the end of the last turn: what was changed at rest, and interrupts that had nothing to do.
            turns = [event for event in logged if not at_rest or event["type"] not in ("session.updated", "user.interrupt")]
            check_history(turns, at_rest=at_rest and bool(turns))
        self.api_portal.call(self._check_rows, logged, at_rest)
        for event in logged:
            if event["type"] == "session.error":
                assert event["error"]["type"] in ("model_overloaded_error", "unknown_error", "model_request_failed_error"), event
                assert "messages" not in event["error"]["message"], f"the model was asked wrongly: {event}"
            assert SECRET not in orjson.dumps(event).decode()
        self.logged = logged
        return logged

    async def _check_rows(self, logged: list[Json], at_rest: bool) -> None:
        await check_rows(self.server.api_db, self.id, logged, at_rest=at_rest)

    def check_stream(self, logged: list[Json]) -> None:
        """What was streamed is what is listed, once it has arrived."""
        self.api_portal.call(self._streamed, len(logged))
        assert self.stream.logged == logged

    async def _streamed(self, count: int) -> None:
        with anyio.fail_after(STEP_SECONDS_MAX):
            while len(self.stream.logged) < count:
                self.server.hub.refresh([self.id])
                await anyio.sleep(0.002)

    def close(self) -> None:
        """End what is left."""
        for process in list(self.processes):
            self.kill(process)


def _parsed(model: Any, body: Json) -> Any:
    return model.model_validate(body)


@asynccontextmanager
async def api(url: str) -> AsyncIterator[tuple[Database, Hub, Hints, TaskGroup]]:
    """The API's side, in its own loop."""
    db = Database(url, pool=5, application_name="test api")
    hub, doorbell = Hub(db), Doorbell(url)
    async with anyio.create_task_group() as group:
        group.start_soon(hub.run)
        yield db, hub, Hints(hub, doorbell), group
        hub.close()
        group.cancel_scope.cancel()
    await db.dispose()


@asynccontextmanager
async def server(url: str, api_side: tuple[Database, Hub, Hints, TaskGroup], workspace_id: str) -> AsyncIterator[Server]:
    """The workers' side, in its own loop."""
    model = Model()
    app = scripted_model.create_app(scripted_model.Script("test", model.answer))
    db = Database(url, pool=10, application_name="test worker")
    api_db, hub, hints, _ = api_side
    with tempfile.TemporaryDirectory(prefix="ma-") as directory:
        settings = Settings(database_url=SecretStr(url), data_dir=Path(directory), sandbox="local")
        async with listening(app) as base_url, anyio.create_task_group() as group:
            endpoint = Endpoint(base_url, SecretStr(SECRET), is_real_api=False, is_loopback=True)
            client = AnthropicModelClient(endpoint)
            worker_hints = Hints(Hub(db), Doorbell(url))
            blobs = LocalBlobStore(Path(directory) / "blobs")
            backend = sandbox_backend(settings, endpoint)
            parts = Parts(
                db=db,
                appender=Appender(db, worker_hints.appended),
                requester=ModelRequester(client, Models(client.anthropic)),
                hands=Hands(db, backend, blobs, sandbox_plan(settings).spec, "here", settings.sandbox_image),
                harnesses={STANDARD: StandardHarness()},
                previews=PreviewSender(url),
                web=WebTools(web_tools(settings, client).fetch, Somewhere()),
                jitter=lambda: 0.0,
            )
            try:
                yield Server(
                    url,
                    api_db,
                    db,
                    hub,
                    Sessions(api_db, hints, SEALER, web_search=True),
                    SessionEvents(api_db, hints, hub),
                    worker_hints,
                    parts,
                    group,
                    WorkspaceId(workspace_id),
                    model,
                )
            finally:
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True), anyio.move_on_after(limits.LOCK_TIMEOUT_SECONDS):
                    await client.aclose()
                    await backend.aclose()
                    await db.dispose()


async def own_clock(url: str) -> None:
    """Give the database a clock that can be set."""
    connection = await connect(url)
    try:
        await connection.execute(_CLOCK)
    finally:
        connection.terminate()


async def new_session(made: Server, api_side: tuple[Database, Hub, Hints, TaskGroup]) -> tuple[SessionId, str, Stream]:
    """A session, and a stream of it that is open from the beginning."""
    session_id, thread_id = await sessions.session(made.api_db, made.workspace_id)
    stream = Stream()
    api_side[3].start_soon(stream.read, made.hub, session_id, thread_id)
    return SessionId(session_id), thread_id, stream
