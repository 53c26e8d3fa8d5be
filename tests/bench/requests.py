"""API calls through the official SDK, one after the other, over an echo through the same client."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import anyio
from anthropic import Anthropic

from tests.bench.figures import Figure, best, ms, percentile
from tests.bench.stack import Stack, free_port, wait_listening

ROUNDS = 3
CALLS = 100
OVER_ECHO_SECONDS_MAX = 0.005
AGENT: dict[str, Any] = {
    "name": "bench",
    "model": "claude-opus-4-8",
    "system": "You are measured.",
    "tools": [{"type": "agent_toolset_20260401"}],
}


def _times(call: Callable[[], object]) -> list[float]:
    times: list[float] = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


async def measure(stack: Stack) -> list[Figure]:
    """The SDK's synchronous client: nothing else runs on the loop meanwhile."""
    return await anyio.to_thread.run_sync(_beside_echo, stack)


def _beside_echo(stack: Stack) -> list[Figure]:
    port = free_port()
    command = ["-m", "uvicorn", "tests.bench.echo:app", "--port", str(port), "--loop", "uvloop", "--http", "httptools"]
    echo = subprocess.Popen([sys.executable, *command, "--lifespan", "off", "--no-access-log", "--log-level", "error"])
    try:
        wait_listening(port)
        return _measure(stack, Anthropic(base_url=f"http://127.0.0.1:{port}", api_key=stack.api_key))
    finally:
        echo.terminate()
        echo.wait()


def _measure(stack: Stack, echo: Anthropic) -> list[Figure]:
    client = Anthropic(base_url=stack.base_url, api_key=stack.api_key)
    agent = client.beta.agents.create(**AGENT)
    environment = client.beta.environments.create(name=f"bench-{time.time_ns()}", config={"type": "cloud"})
    session = client.beta.sessions.create(agent=agent.id, environment_id=environment.id)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "agents.create": (lambda: client.beta.agents.create(**AGENT), lambda: echo.beta.agents.create(**AGENT)),
        "sessions.retrieve": (
            lambda: client.beta.sessions.retrieve(session.id),
            lambda: echo.beta.sessions.retrieve(session.id),
        ),
    }
    figures: list[Figure] = []
    for name, (ours, bare) in calls.items():
        rounds = [(_times(ours), _times(bare)) for _ in range(ROUNDS)]
        over = best([one for one, _ in rounds]) - best([one for _, one in rounds])
        p95 = min(percentile(one, 0.95) for one, _ in rounds)
        figures.append(
            Figure(
                f"{name} through the SDK, over an echo",
                f"p50 +{ms(over)} (p95 {ms(p95)} in all)",
                "p50 <= +5 ms",
                over <= OVER_ECHO_SECONDS_MAX,
                f"ASGI echo, same client: {ms(best([one for _, one in rounds]))}",
            )
        )
    return figures
