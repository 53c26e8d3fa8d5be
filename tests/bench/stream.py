"""From a commit to the streams of the api process. We play the worker: append through the batcher, ring the doorbell."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
from anyio.abc import TaskStatus
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.db.listener import Doorbell
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.batch import Append, Appender
from managed_agents.eventlog.events import NewEvent, StoredEvent
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.subscribe import Hub
from managed_agents.harness import heartbeat
from tests.bench import turns, wire
from tests.bench.figures import Figure, best, ms
from tests.bench.stack import Stack

ROUNDS = 3
PER_SECOND = 1000
BURST = 10
PACED_EVENTS = 2000
CLIENTS = 500
FANOUT_EVENTS = 400
TTL_SECONDS = 15.0  # the real worker's: it judges our heartbeat by its own
BODY = {"content": [{"type": "text", "text": "x" * 400}]}
ROUND_SECONDS_MAX = 60.0


class Writer:
    """Appends to sessions of the running server, and knows when each event was committed."""

    def __init__(self, db: Database, url: str) -> None:
        self.db = db
        self.worker_id = ""
        self._url = url
        self.doorbell = Doorbell(url)
        self._hints = Hints(Hub(db), self.doorbell)
        self.appender = Appender(db, self._publish)
        self.committed: dict[bytes, float] = {}

    def _publish(self, rows: list[StoredEvent]) -> None:
        now = time.perf_counter()
        for row in rows:
            self.committed[row.id.encode()] = now
        self._hints.appended(rows)

    async def live(self, *, task_status: TaskStatus[None]) -> None:
        """Be a worker to the others: sessions of one that shows no sign of life are taken from it."""

        async def work(worker_id: str) -> None:
            self.worker_id = worker_id
            task_status.started()
            await anyio.sleep_forever()

        await heartbeat.live(self._url, host="bench", ttl_seconds=TTL_SECONDS, work=work)

    async def own(self, session_id: str) -> str:
        """Take the session. Returns its thread."""
        async with self.db.transaction() as tx:
            statement = text("UPDATE sessions SET owner = :worker, epoch = 1 WHERE id = :id RETURNING primary_thread_id")
            return (await tx.execute(statement, {"worker": self.worker_id, "id": session_id})).scalar_one()

    async def append(self, session_id: str, thread_id: str, count: int) -> None:
        events: list[NewEvent] = [ev.new_event("agent.message", thread_id, BODY) for _ in range(count)]
        await self.appender.append(Append(session_id, events, self.worker_id, 1))


@asynccontextmanager
async def _writing(stack: Stack) -> AsyncIterator[Writer]:
    db = Database(stack.postgres.url, pool=4, application_name="bench")
    try:
        writer = Writer(db, stack.postgres.url)
        async with anyio.create_task_group() as group:
            group.start_soon(writer.doorbell.run)
            await group.start(writer.live)
            await group.start(writer.appender.run)
            yield writer
            group.cancel_scope.cancel()
    finally:
        await db.dispose()


async def measure(stack: Stack) -> list[Figure]:
    async with turns.benching(stack) as bench, _writing(stack) as writer:
        delays = [await _paced(bench, writer) for _ in range(ROUNDS)]
        rates = [await _fanout(bench, writer) for _ in range(ROUNDS)]
        commits = [await turns.commits(stack) for _ in range(ROUNDS)]
    p95, rate = best(delays, 0.95), max(rates)
    return [
        Figure(
            f"commit -> SSE over HTTP at {PER_SECOND:,} events/s",
            f"p50 {ms(best(delays))}, p95 {ms(p95)}",
            "p95 <= 10 ms",
            p95 <= 0.010,
            f"one Postgres commit: {ms(best(commits))}",
        ),
        Figure(
            f"fan-out to {CLIENTS} SSE clients of one api process",
            f"{rate:,.0f} deliveries/s",
            ">= 30,000/s",
            rate >= 30_000,
            "clients share the two cores",
        ),
    ]


async def _paced(bench: turns.Bench, writer: Writer) -> list[float]:
    """Seconds from the commit of each event until its client has it."""
    session_id = await bench.session()
    thread_id = await writer.own(session_id)
    stream = await bench.stream(session_id)
    reading = asyncio.ensure_future(_read(stream))
    started = time.perf_counter()
    for burst in range(PACED_EVENTS // BURST):
        await asyncio.sleep(max(0.0, started + burst * BURST / PER_SECOND - time.perf_counter()))
        await writer.append(session_id, thread_id, BURST)
    received = await asyncio.wait_for(reading, ROUND_SECONDS_MAX)
    stream.close()
    # A poll or an earlier ring may deliver an event before its writer has heard of the commit.
    return [max(0.0, at - writer.committed[event_id]) for event_id, at in received.items()]


async def _read(stream: wire.Connection) -> dict[bytes, float]:
    received: dict[bytes, float] = {}
    while len(received) < PACED_EVENTS:
        frame = await stream.reader.readuntil(b"\n\n")
        if b'"id":"' in frame:
            received[frame.split(b'"id":"')[1].split(b'"')[0]] = time.perf_counter()
    return received


async def _fanout(bench: turns.Bench, writer: Writer) -> float:
    """Deliveries per second, from the first append until the last client has everything."""
    session_id = await bench.session()
    thread_id = await writer.own(session_id)
    arguments = [urlsplit(bench.stack.base_url).port, f"/v1/sessions/{session_id}/events/stream", bench.stack.api_key]
    clients = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.sse_clients", *map(str, [*arguments, CLIENTS, FANOUT_EVENTS]),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert clients.stdout is not None
        async with asyncio.timeout(ROUND_SECONDS_MAX):
            assert await clients.stdout.readline() == b"ready\n"
            started = time.perf_counter()
            for _ in range(FANOUT_EVENTS):  # one a commit, so that little can be sent together
                await writer.append(session_id, thread_id, 1)
            return CLIENTS * FANOUT_EVENTS / (float(await clients.stdout.readline()) - started)
    finally:
        if clients.returncode is None:
            clients.terminate()
        await clients.wait()
