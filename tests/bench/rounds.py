"""What the harness adds to a round of tools: everything from one model request to the next, less the model and the command.

Both are taken out as measured in the same run: the model by asking it the very requests of the turn once more over a bare
connection, the command by calling it at `execute()` in a container of its own. The first round, which waits for the
container, is left out. On a loaded machine the worker's processor time, which waits for nobody, tells more.
"""

import asyncio
import tempfile
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from managed_agents.core import ids
from managed_agents.core.settings import Settings
from managed_agents.sandbox.backend import Limits, SandboxSpec
from managed_agents.sandbox.docker import DockerBackend
from tests.bench import rest, tools, turns, wire
from tests.bench.figures import Figure, best, ms
from tests.bench.script import ROUNDS
from tests.bench.stack import Stack
from tests.support.sandboxes import nothing_known

TURNS = 3
ADDED_SECONDS_MAX = 0.010
COMMANDS = 60
MODEL_HEADERS = {"anthropic-version": "2023-06-01", "x-api-key": "scripted"}
MESSAGE = {"events": [{"type": "user.message", "content": [{"type": "text", "text": "Rounds, please."}]}]}


async def measure(stack: Stack) -> list[Figure]:
    command = await _command()
    rounds: list[list[float]] = []
    models: list[list[float]] = []
    phases: list[list[float]] = [[], []]
    used = -rest.cpu_seconds(stack.pids["worker"])
    async with (
        wire.connected(stack.base_url, stack.headers) as connection,
        wire.connected(stack.model_url, MODEL_HEADERS) as model,
    ):
        toolset = [{"type": "agent_toolset_20260401"}]
        agent = await connection.request("POST", "/v1/agents", {"name": "rounds", "model": "claude-opus-4-8", "tools": toolset})
        named = {"name": f"rounds-{time.time_ns()}", "config": {"type": "cloud"}}
        environment = await connection.request("POST", "/v1/environments", named)
        for _ in range(TURNS):
            session = {"agent": agent["id"], "environment_id": environment["id"]}
            session_id = (await connection.request("POST", "/v1/sessions", session))["id"]
            records = await _turn(stack, connection, model, session_id)
            for phase, seconds in zip(phases, await _phases(connection, session_id), strict=True):
                phase += seconds
            arrived = [record["received_at"] for record in records]
            rounds.append([after - before for before, after in pairwise(arrived[1:])])
            models.append([await _ask(stack, record["body"]) for record in records[1:-1]])
    used += rest.cpu_seconds(stack.pids["worker"])
    whole, asking = best(rounds), best(models)
    added = whole - asking - command
    return [
        Figure(
            "added to a round of tools, model and command less",
            f"p50 {ms(added)} (worker's processor {ms(used / TURNS / ROUNDS)})",
            "p50 <= 10 ms",
            added <= ADDED_SECONDS_MAX,
            f"a whole round {ms(whole)}: model {ms(asking)}, `true` at execute() {ms(command)}; from commit to commit: request, "
            f"response {ms(best([phases[0]]))}, result with the next request {ms(best([phases[1]]))}",
        )
    ]


async def _phases(connection: wire.Connection, session_id: str) -> list[list[float]]:
    """Of each round, by the log: request to response, and response to the result, which comes with the next request."""
    listed = (await connection.request("GET", f"/v1/sessions/{session_id}/events"))["data"]
    at = [(event["type"], datetime.fromisoformat(event["processed_at"])) for event in listed]
    steps = ("span.model_request_start", "span.model_request_end", "agent.tool_result")
    found: list[list[float]] = []
    for before, after in pairwise(steps):
        times = [[moment for kind, moment in at if kind == step] for step in (before, after)]
        found.append([(end - start).total_seconds() for start, end in zip(times[0][1:], times[1][1:], strict=False)])
    return found


async def _turn(stack: Stack, connection: wire.Connection, model: wire.Connection, session_id: str) -> list[dict[str, Any]]:
    """Run one turn of `ROUNDS` rounds; returns the requests that the model got."""
    since = (await model.request("GET", "/_scripted/requests?since=1000000000"))["total"]
    stream = await wire.connect(stack.base_url, stack.headers)
    status, _ = await stream.begin("GET", f"/v1/sessions/{session_id}/events/stream")
    assert status == 200
    await connection.request("POST", f"/v1/sessions/{session_id}/events", MESSAGE)
    await asyncio.wait_for(stream.until(turns.IDLE), turns.TURN_SECONDS_MAX)
    stream.close()
    records = (await model.request("GET", f"/_scripted/requests?since={since}"))["data"]
    assert len(records) == ROUNDS + 1, f"{len(records)} requests"
    return records


async def _ask(stack: Stack, body: dict[str, Any]) -> float:
    """How long the model takes to answer this request to a client that does nothing else."""
    async with wire.connected(stack.model_url, MODEL_HEADERS) as connection:
        started = time.perf_counter()
        status, _ = await connection.begin("POST", "/v1/messages", body)
        assert status == 200
        await connection.until(b"message_stop")
        return time.perf_counter() - started


async def _command() -> float:
    with tempfile.TemporaryDirectory(prefix="ma-bench-sbx-") as directory:
        place = Path(directory)
        backend = DockerBackend(installation=f"bench{time.time_ns() % 10**8}", data_dir=place, run_dir=place / "run")
        image: str = Settings.model_fields["sandbox_image"].default
        try:
            sandbox = await backend.provision(SandboxSpec(ids.new_id(ids.SANDBOX), 1, image, Limits(disk_bytes=tools.DISK_BYTES)))
            await tools.calls(sandbox, 5)
            times = await tools.calls(sandbox, COMMANDS)
            await sandbox.destroy()
        finally:
            await backend.collect_orphans(nothing_known)
            await backend.aclose()
    return best([times])
