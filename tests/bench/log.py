"""Append throughput of one process against raw inserts of the same rows by pgbench."""

import subprocess
import tempfile
import time
from pathlib import Path
from statistics import fmean

import anyio

from managed_agents.db import embedded
from managed_agents.db.databases import create_database
from managed_agents.db.engine import Database
from managed_agents.db.migrate import upgrade
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.batch import Append, Appender
from managed_agents.eventlog.events import NewEvent
from tests.bench.figures import Figure
from tests.bench.stack import Stack
from tests.support import sessions

WRITERS = 64
TURNS_PER_WRITER = 25
BODY = "x" * 400
PRIVATE = {"response": {"content": [{"type": "text", "text": "x" * 300}]}}
ROUNDS = 3
PGBENCH_SECONDS = 3
STAMP_BYTES = 45  # what the append adds: `processed_at`


async def measure(stack: Stack) -> list[Figure]:
    url = await create_database(stack.postgres.url, f"bench_{time.time_ns()}")
    await upgrade(url)
    db = Database(url, pool=10, application_name="bench")
    try:
        workspace = await sessions.workspace(db)
        # In turns, so that both see the same machine.
        await anyio.to_thread.run_sync(_prepare_raw, url)
        rounds = [(await _appends(db, workspace), await anyio.to_thread.run_sync(_pgbench, url)) for _ in range(ROUNDS)]
    finally:
        await db.dispose()
    ours, raw = max(one for one, _ in rounds), max(one for _, one in rounds)
    return [
        Figure(
            f"events appended by one process, {WRITERS} writers",
            f"{ours:,.0f}/s = {ours / raw:.2f} x raw",
            ">= 1.0 x raw",
            ours >= raw,
            f"pgbench, the same rows, one a commit, {WRITERS} clients: {raw:,.0f}/s",
        )
    ]


def _event(thread_id: str) -> NewEvent:
    return ev.new_event("agent.message", thread_id, {"content": [{"type": "text", "text": BODY}]}, private=PRIVATE)


def _turn(thread_id: str) -> list[list[NewEvent]]:
    """The appends of one turn with two tool rounds, as the harness makes them."""
    usage = ev.SpanUsage(1200, 80, 900, 100, 0)
    start = ev.span_start(thread_id)
    appends = [[*ev.running(thread_id, "bench"), _event(thread_id), start]]
    for _ in range(2):
        call = ev.new_event("agent.tool_use", thread_id, {"name": "bash", "input": {"command": BODY}})
        end = ev.span_end(thread_id, start.id, usage, is_error=False, private=PRIVATE)
        result = ev.tool_result(thread_id, call.id, [{"type": "text", "text": BODY}], is_error=False)
        start = ev.span_start(thread_id)
        appends += [[call, end], [result], [start]]
    end = ev.span_end(thread_id, start.id, usage, is_error=False, private=PRIVATE)
    return [*appends, [_event(thread_id), end], ev.idle(thread_id, "bench", {"type": "end_turn"})]


_ONE_TURN = [event for append in _turn("sthr_0103500000000000000000000") for event in append]
EVENTS_PER_TURN = len(_ONE_TURN)


async def _appends(db: Database, workspace: str) -> float:
    """Events per second, each caller waiting for its own commit."""
    targets = [await sessions.session(db, workspace, owner="wrk_bench", epoch=1) for _ in range(WRITERS)]
    appender = Appender(db, lambda _rows: None)
    rate = 0.0
    async with anyio.create_task_group() as group:
        await group.start(appender.run)

        async def write(session_id: str, thread_id: str, turns: int) -> None:
            for _ in range(turns):
                for events in _turn(thread_id):
                    await appender.append(Append(session_id, events, "wrk_bench", 1))

        async def everybody(turns: int) -> float:
            started = time.perf_counter()
            async with anyio.create_task_group() as writers:
                for session_id, thread_id in targets:
                    writers.start_soon(write, session_id, thread_id, turns)
            return WRITERS * turns * EVENTS_PER_TURN / (time.perf_counter() - started)

        await everybody(1)
        rate = await everybody(TURNS_PER_WRITER)
        group.cancel_scope.cancel()
    return rate


def _client(url: str, program: str) -> tuple[list[str | Path], str]:
    from sqlalchemy.engine import make_url

    target = make_url(url)
    command = [embedded.find_binaries().prefix / "bin" / program, "-h", str(target.query["host"]), "-U", str(target.username)]
    return command, str(target.database)


def _prepare_raw(url: str) -> None:
    command, database = _client(url, "psql")
    setup = "CREATE TABLE bench_events (LIKE events INCLUDING ALL); CREATE SEQUENCE bench_seq"
    subprocess.run([*command, "-d", database, "-qc", setup], check=True)


def _pgbench(url: str) -> float:
    """Plain inserts into a table of the same shape, without order, fold or guard; bodies as long as a turn's are on average."""
    body = "x" * round(STAMP_BYTES + fmean(len(event.payload or b"x" * 300) for event in _ONE_TURN))
    private = "x" * round(fmean(len(event.private or b"") for event in _ONE_TURN))
    script = (
        "INSERT INTO bench_events (session_id, seq, id, thread_id, type, processed_at, tool_use_id, for_model, body, private) "
        "VALUES ('sesn_0103500000000000000' || :client_id, nextval('bench_seq'), 'sevt_0103500000000000000000000', "
        "'sthr_0103500000000000000000000', 'span.model_request_start', clock_timestamp(), NULL, true, "
        f"'{body}', '{private}');\n"
    )
    command, database = _client(url, "pgbench")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "insert.sql"
        path.write_text(script)
        load = ["-n", "-M", "prepared", "-c", str(WRITERS), "-j", "2", "-T", str(PGBENCH_SECONDS), "-f", str(path)]
        done = subprocess.run([*command, *load, database], check=True, capture_output=True, text=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("tps")]
    return float(line.split("=")[1].split()[0])
