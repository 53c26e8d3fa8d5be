"""Sessions that wait on the model, all in one worker: its memory, beside a bare client with as many open requests."""

import asyncio
import sys

from tests.bench import rest, turns, wire
from tests.bench.figures import Figure
from tests.bench.stack import Stack

SESSIONS = 500
SENDERS = 20
WORKER_MIB_MAX = 300
SETTLE_SECONDS = 2.0
WAIT_SECONDS_MAX = 50
MESSAGE = {"events": [{"type": "user.message", "content": [{"type": "text", "text": "Wait, please."}]}]}
INTERRUPT = {"events": [{"type": "user.interrupt"}]}
BARE = """
import asyncio, sys
import httpx2

async def ask(client):
    body = {"model": "claude-opus-4-8", "max_tokens": 1000, "stream": True, "messages": [{"role": "user", "content": "Wait."}]}
    async with client.stream("POST", "/v1/messages", json=body) as answer:
        async for _ in answer.aiter_bytes():
            pass

async def main(url, count):
    headers = {"anthropic-version": "2023-06-01", "x-api-key": "scripted"}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=None) as client:
        await asyncio.gather(*(ask(client) for _ in range(count)))

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def measure(stack: Stack) -> list[Figure]:
    worker = stack.pids["worker"]
    before = rest.pss(worker)
    async with turns.benching(stack) as bench, wire.connected(stack.model_url, {}) as model:
        sessions = [await bench.session() for _ in range(SESSIONS)]
        await model.request("POST", "/_scripted/reset")
        await _send(stack, sessions, MESSAGE)
        await model.request("GET", f"/_scripted/wait?count={SESSIONS}&seconds={WAIT_SECONDS_MAX}")
        await asyncio.sleep(SETTLE_SECONDS)
        waiting = rest.pss(worker)
        await _send(stack, sessions, INTERRUPT)
        await model.request("POST", "/_scripted/reset")
        bare = await _bare(stack, model)
    return [
        Figure(
            f"{SESSIONS} sessions waiting on the model, one worker (PSS)",
            f"{waiting / rest.MIB:.0f} MiB ({(waiting - before) / SESSIONS / 1024:.0f} KiB each)",
            f"<= {WORKER_MIB_MAX} MiB",
            waiting <= WORKER_MIB_MAX * rest.MIB,
            f"before {before / rest.MIB:.0f} MiB; a bare client with as many requests open: {bare / rest.MIB:.0f} MiB",
        )
    ]


async def _send(stack: Stack, sessions: list[str], body: dict[str, object]) -> None:
    async def some(mine: list[str]) -> None:
        async with wire.connected(stack.base_url, stack.headers) as connection:
            for session_id in mine:
                await connection.request("POST", f"/v1/sessions/{session_id}/events", body)

    await asyncio.gather(*(some(sessions[first::SENDERS]) for first in range(SENDERS)))


async def _bare(stack: Stack, model: wire.Connection) -> int:
    """Memory of a process that has as many requests open and does nothing else."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", BARE, stack.model_url, str(SESSIONS))
    try:
        await model.request("GET", f"/_scripted/wait?count={SESSIONS}&seconds={WAIT_SECONDS_MAX}")
        return rest.pss(child.pid)
    finally:
        child.kill()
        await child.wait()
