"""Whole turns through HTTP: one after the other, many at once, and the way of a message to the model."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from managed_agents.db.engine import asyncpg_arguments
from tests.bench import wire
from tests.bench.figures import Figure, best, ms
from tests.bench.stack import Stack

ROUNDS = 3
TURNS = 60
TURNS_PER_SESSION = 10  # a claim reads the session's log: long ones cost more
AT_ONCE = 200
AT_ONCE_ROUNDS = 3
MESSAGE = {"events": [{"type": "user.message", "content": [{"type": "text", "text": "Say ok."}]}]}
IDLE = b"event: session.status_idle"
TURN_SECONDS_MAX = 60.0


class Bench:
    """Makes sessions without tools, so that no container is on the way."""

    def __init__(self, stack: Stack, connection: wire.Connection, agent_id: str, environment_id: str) -> None:
        self.stack = stack
        self.connection = connection
        self._session: dict[str, str] = {"agent": agent_id, "environment_id": environment_id}

    async def session(self) -> str:
        return (await self.connection.request("POST", "/v1/sessions", self._session))["id"]

    async def stream(self, session_id: str) -> wire.Connection:
        """A connection whose stream is open."""
        connection = await wire.connect(self.stack.base_url, self.stack.headers)
        status, _ = await connection.begin("GET", f"/v1/sessions/{session_id}/events/stream")
        assert status == 200
        return connection

    async def send(self, connection: wire.Connection, session_id: str) -> None:
        await connection.request("POST", f"/v1/sessions/{session_id}/events", MESSAGE)


@asynccontextmanager
async def benching(stack: Stack) -> AsyncIterator[Bench]:
    """An agent without tools and an environment for the block."""
    async with wire.connected(stack.base_url, stack.headers) as connection:
        agent = await connection.request("POST", "/v1/agents", {"name": "bench", "model": "claude-opus-4-8"})
        name = f"bench-{time.time_ns()}"
        environment = await connection.request("POST", "/v1/environments", {"name": name, "config": {"type": "cloud"}})
        yield Bench(stack, connection, agent["id"], environment["id"])


async def measure(stack: Stack) -> list[Figure]:
    async with benching(stack) as bench:
        await _serial(bench, 10)  # warm: model limits are looked up, statements prepared
        raw = [await commits(stack) for _ in range(ROUNDS)]
        turns = [await _serial(bench, TURNS) for _ in range(ROUNDS)]
        to_model = [await _to_model(bench, TURNS) for _ in range(ROUNDS)]
        together = [await at_once(bench, AT_ONCE) for _ in range(AT_ONCE_ROUNDS)]
    commit = f"one Postgres commit: {ms(best(raw))}"
    p50, p95 = best(turns), best(turns, 0.95)
    leaves, leaves_p95 = best(to_model), best(to_model, 0.95)
    return [
        Figure(
            "trivial turn, send -> session.status_idle (SSE)",
            f"p50 {ms(p50)}, p95 {ms(p95)}",
            "p50 <= 40 ms, p95 <= 80 ms",
            p50 <= 0.040 and p95 <= 0.080,
            commit,
        ),
        Figure(
            "message -> model request arrives, no container",
            f"p50 {ms(leaves)}, p95 {ms(leaves_p95)}",
            "p50 <= 10 ms",
            leaves <= 0.010,
            f"send begun to answer included; {commit}",
        ),
        Figure(
            f"{AT_ONCE} trivial turns at once",
            f"{min(together):.2f} s = {AT_ONCE / min(together):.0f} turns/s",
            "all complete, <= 4 s",
            min(together) <= 4.0,
            f"the same one by one: {AT_ONCE * p50:.2f} s",
        ),
    ]


async def commits(stack: Stack) -> list[float]:
    """The raw baseline: one row, one commit."""
    connection: Any = await asyncpg.connect(**asyncpg_arguments(stack.postgres.url))
    times: list[float] = []
    try:
        await connection.execute("CREATE TABLE IF NOT EXISTS bench_commits (body text)")
        for _ in range(TURNS):
            started = time.perf_counter()
            await connection.execute("INSERT INTO bench_commits VALUES ($1)", "x" * 500)
            times.append(time.perf_counter() - started)
    finally:
        await connection.close()
    return times


async def _serial(bench: Bench, turns: int) -> list[float]:
    times: list[float] = []
    for _ in range(turns // TURNS_PER_SESSION):
        session_id = await bench.session()
        stream = await bench.stream(session_id)
        for _ in range(TURNS_PER_SESSION):
            started = time.perf_counter()
            sending = asyncio.ensure_future(bench.send(bench.connection, session_id))
            await asyncio.wait_for(stream.until(IDLE), TURN_SECONDS_MAX)
            times.append(time.perf_counter() - started)
            await sending
        stream.close()
    return times


async def _to_model(bench: Bench, turns: int) -> list[float]:
    times: list[float] = []
    async with wire.connected(bench.stack.model_url, {}) as model:
        for _ in range(turns // TURNS_PER_SESSION):
            session_id = await bench.session()
            stream = await bench.stream(session_id)
            for _ in range(TURNS_PER_SESSION):
                since = (await model.request("GET", "/_scripted/requests?since=1000000000"))["total"]
                started = time.time()
                await bench.send(bench.connection, session_id)
                await asyncio.wait_for(stream.until(IDLE), TURN_SECONDS_MAX)
                [record] = (await model.request("GET", f"/_scripted/requests?since={since}"))["data"]
                times.append(record["received_at"] - started)
            stream.close()
    return times


async def at_once(bench: Bench, count: int) -> float:
    """Seconds from the first send until every stream has told of its idle session. Each client has its own connections."""
    sessions = [await bench.session() for _ in range(count)]
    streams = [await bench.stream(session_id) for session_id in sessions]
    senders = [await wire.connect(bench.stack.base_url, bench.stack.headers) for _ in sessions]
    started = time.perf_counter()
    async with asyncio.timeout(TURN_SECONDS_MAX):
        await asyncio.gather(
            *(bench.send(sender, session_id) for sender, session_id in zip(senders, sessions, strict=True)),
            *(stream.until(IDLE) for stream in streams),
        )
    seconds = time.perf_counter() - started
    for connection in (*streams, *senders):
        connection.close()
    return seconds
