"""What a page of a history costs where it lies: the first and the last of a long session beside those of a short one.

The events are written straight into the table: a tenth of a million, or as many as `MANAGED_AGENTS_BENCH_EVENTS` says.
Without a clock, and for a million, `tests/integration/eventlog/test_history.py` counts what is touched in the database.
"""

import os
import time

import asyncpg
import httpx

from managed_agents.db.engine import asyncpg_arguments
from tests.bench.figures import Figure, best, ms
from tests.bench.stack import Stack
from tests.support.histories import HEAD, insert_events

SHORT = 1_000
LONG_DEFAULT = 100_000
LIMIT = 100
ROUNDS = 3
PAGES = 60
WARM = 20
RATIO_MAX = 1.5


async def measure(stack: Stack) -> list[Figure]:
    long = int(os.environ.get("MANAGED_AGENTS_BENCH_EVENTS", LONG_DEFAULT))
    async with httpx.AsyncClient(base_url=stack.base_url, headers=stack.headers, timeout=30) as client:
        agent = (await client.post("/v1/agents", json={"name": "lists", "model": "claude-opus-5"})).json()
        environment = (await client.post("/v1/environments", json={"name": f"lists {time.time()}"})).json()
        body = {"agent": agent["id"], "environment_id": environment["id"]}
        lengths = {length: (await client.post("/v1/sessions", json=body)).json()["id"] for length in (SHORT, long)}
        connection = await asyncpg.connect(**asyncpg_arguments(stack.postgres.url))
        try:
            for length, session_id in lengths.items():
                await _write(connection, session_id, length)
            await connection.execute("VACUUM ANALYZE events")
        finally:
            await connection.close()
        figures: list[Figure] = []
        for name, query in (
            ("first page", "asc"),
            ("last page", f"asc&page={await _cursor(client, lengths[long])}"),
            ("newest first", "desc"),
            ("a late instant", f"asc&created_at[gte]={_instant(long - LIMIT + 1)}"),
            ("types", "asc&types[]=user.message&types[]=session.error"),
        ):
            baseline, seconds = await _seconds(client, (lengths[SHORT], "asc"), (lengths[long], query))
            figures.append(
                Figure(
                    f"{name} of {long:,} events",
                    f"{ms(seconds)} = {seconds / baseline:.2f} x",
                    f"<= {RATIO_MAX} x first page of {SHORT:,}",
                    seconds <= RATIO_MAX * baseline,
                    f"{SHORT:,}: {ms(baseline)}",
                )
            )
    return figures


async def _write(connection: asyncpg.Connection, session_id: str, length: int) -> None:
    thread_id = await connection.fetchval("SELECT primary_thread_id FROM sessions WHERE id = $1", session_id)
    step = 50_000
    for first in range(1, length + 1, step):
        last = min(first + step - 1, length)
        await connection.execute(insert_events("$1", "$2", "$3", "$4"), session_id, thread_id, first, last)
    await connection.execute(HEAD.format(last="$1", session_id="$2"), length, session_id)


def _instant(seq: int) -> str:
    return f"2026-01-01T{seq // 3_600_000:02d}:{seq // 60_000 % 60:02d}:{seq // 1000 % 60:02d}.{seq % 1000:03d}Z"


async def _cursor(client: httpx.AsyncClient, session_id: str) -> str:
    """The cursor that leads to the last page: that of the page before it, which is found by its instant."""
    path = f"/v1/sessions/{session_id}/events"
    (newest,) = (await client.get(f"{path}?limit=1&order=desc")).json()["data"]
    before = int(newest["id"].removeprefix("sevt_01")) - 2 * LIMIT
    return (await client.get(f"{path}?limit={LIMIT}&created_at[gt]={_instant(before)}")).json()["next_page"]


async def _seconds(client: httpx.AsyncClient, *asked: tuple[str, str]) -> list[float]:
    """The best of the rounds' medians for each page asked for, by turns, so that other load falls on all of them."""
    rounds: list[list[list[float]]] = [[] for _ in asked]
    for number in range(ROUNDS + 1):
        took: list[list[float]] = [[] for _ in asked]
        for _ in range(PAGES if number else WARM):
            for each, (session_id, query) in zip(took, asked, strict=True):
                started = time.perf_counter()
                answer = await client.get(f"/v1/sessions/{session_id}/events?limit={LIMIT}&order={query}")
                each.append(time.perf_counter() - started)
                assert len(answer.json()["data"]) == LIMIT, answer.text[:500]
        if number:
            for of_page, each in zip(rounds, took, strict=True):
                of_page.append(each)
    return [best(of_page) for of_page in rounds]
