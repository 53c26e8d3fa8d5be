"""Append throughput of one process against raw inserts by pgbench, and the fan-out."""

import subprocess
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

import anyio

from managed_agents.db import embedded
from managed_agents.db.databases import create_database
from managed_agents.db.engine import Database
from managed_agents.db.listener import LOG_CHANNEL, Doorbell, listen
from managed_agents.db.migrate import upgrade
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.batch import Append, Appender
from managed_agents.eventlog.events import NewEvent, StoredEvent
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.subscribe import Hub
from tests.bench.figures import Figure, ms, percentile
from tests.support import sessions

WRITERS = 64
TURNS_PER_WRITER = 25
BODY = "x" * 400
PRIVATE = {"response": {"content": [{"type": "text", "text": "x" * 300}]}}
PGBENCH_SECONDS = 5
FANOUT_CLIENTS = 500
PACED_EVENTS = 3000


async def measure(server: embedded.EmbeddedPostgres) -> list[Figure]:
    url = await create_database(server.url, f"bench_{time.time_ns()}")
    await upgrade(url)
    db = Database(url, pool=10, application_name="bench")
    try:
        workspace = await sessions.workspace(db)
        return [await _appends(db, url, workspace), *await _fanout(db, url, workspace)]
    finally:
        await db.dispose()


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


EVENTS_PER_TURN = sum(len(append) for append in _turn("sthr_count"))


async def _appends(db: Database, url: str, workspace: str) -> Figure:
    targets = [await sessions.session(db, workspace, owner="wrk_bench", epoch=1) for _ in range(WRITERS)]
    appender = Appender(db, lambda _rows: None)
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

        await everybody(2)
        ours = await everybody(TURNS_PER_WRITER)
        group.cancel_scope.cancel()
    raw = await anyio.to_thread.run_sync(_pgbench, url)
    return Figure(
        "events appended by one process, 64 writers",
        f"{ours:,.0f}/s = {ours / raw:.2f} x raw",
        ">= 1.0 x raw",
        ours >= raw,
        f"pgbench, one insert a commit, 64 clients: {raw:,.0f}/s",
    )


def _pgbench(url: str) -> float:
    """Plain inserts of the same rows into a table of the same shape, without order, fold or guard."""
    from sqlalchemy.engine import make_url

    target = make_url(url)
    host = str(target.query["host"])
    body, private = '{"type":"agent.message","content":"' + BODY + '"}', "x" * 330
    script = (
        "INSERT INTO bench_events (session_id, seq, id, thread_id, type, processed_at, tool_use_id, for_model, body, "
        f"private) VALUES ('sesn_' || :client_id, nextval('bench_seq'), 'sevt_0123456789012345678901234', 'sthr', "
        f"'agent.message', clock_timestamp(), NULL, true, '{body}', '{private}');\n"
    )
    base = ["-h", host, "-U", str(target.username)]
    binaries = embedded.find_binaries().prefix / "bin"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "insert.sql"
        path.write_text(script)
        setup = "CREATE TABLE bench_events (LIKE events INCLUDING ALL); CREATE SEQUENCE bench_seq; "
        subprocess.run([binaries / "psql", *base, "-d", str(target.database), "-qc", setup], check=True)
        done = subprocess.run(
            [binaries / "pgbench", *base, "-n", "-M", "prepared", "-c", str(WRITERS), "-j", "2", "-T",
             str(PGBENCH_SECONDS), "-f", str(path), str(target.database)],
            check=True,
            capture_output=True,
            text=True,
        )  # fmt: skip
    [line] = [line for line in done.stdout.splitlines() if line.startswith("tps")]
    return float(line.split("=")[1].split()[0])


async def _fanout(db: Database, url: str, workspace: str) -> list[Figure]:
    hub, doorbell = Hub(db), Doorbell(url)
    hints = Hints(hub, doorbell)
    session_id, thread_id = await sessions.session(db, workspace, owner="wrk_bench", epoch=1)
    committed: dict[bytes, float] = {}
    delays: list[float] = []
    delivered = 0

    def publish(rows: list[StoredEvent]) -> None:
        now = time.perf_counter()
        for row in rows:
            committed[row.id.encode()] = now
        hints.appended(rows)

    appender = Appender(db, publish)
    async with anyio.create_task_group() as group:
        for task in (hub.run, doorbell.run):
            group.start_soon(task)
        group.start_soon(listen, url, {LOG_CHANNEL: hub.refresh}, hub.refresh_all)
        await group.start(appender.run)

        async def read_one() -> None:
            async with aclosing(hub.subscribe(session_id, thread_id, seq=0, inbox_seq=0)) as frames:
                async for chunk in frames:
                    now = time.perf_counter()
                    for frame in chunk.split(b"\n\n"):
                        if b'"id":"' in frame:
                            delays.append(now - committed[frame.split(b'"id":"')[1].split(b'"')[0]])

        async with anyio.create_task_group() as paced:
            paced.start_soon(read_one)
            # 1,000 events a second: ten every 10 ms.
            start = time.perf_counter()
            for tick in range(PACED_EVENTS // 10):
                await anyio.sleep(max(0.0, start + tick / 100 - time.perf_counter()))
                await appender.append(Append(session_id, [_event(thread_id) for _ in range(10)], "wrk_bench", 1))
            with anyio.fail_after(10):
                while len(delays) < PACED_EVENTS:
                    await anyio.sleep(0.01)
            paced.cancel_scope.cancel()

        other, other_thread = await sessions.session(db, workspace, owner="wrk_bench", epoch=1)
        count = 400

        async def read_many() -> None:
            nonlocal delivered
            async with aclosing(hub.subscribe(other, other_thread, seq=0, inbox_seq=0)) as frames:
                async for chunk in frames:
                    delivered += chunk.count(b"\n\n")

        async with anyio.create_task_group() as many:
            for _ in range(FANOUT_CLIENTS):
                many.start_soon(read_many)
            await anyio.sleep(0.2)
            started = time.perf_counter()
            for _ in range(count // 10):
                await appender.append(Append(other, [_event(other_thread) for _ in range(10)], "wrk_bench", 1))
            with anyio.fail_after(60):
                while delivered < count * FANOUT_CLIENTS:
                    await anyio.sleep(0.01)
            rate = delivered / (time.perf_counter() - started)
            many.cancel_scope.cancel()
        group.cancel_scope.cancel()
    p95 = percentile(delays, 0.95)
    return [
        Figure("commit -> subscriber at 1,000 events/s", f"p50 {ms(percentile(delays, 0.5))}, p95 {ms(p95)}",
               "p95 <= 10 ms", p95 <= 0.010),
        Figure("fan-out to 500 subscribers of one process", f"{rate:,.0f} deliveries/s", ">= 30,000/s", rate >= 30_000),
    ]  # fmt: skip
