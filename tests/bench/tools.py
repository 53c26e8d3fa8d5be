"""A warm tool call in a container, at `execute()`, against a plain process on the host."""

import subprocess
import tempfile
import time
from pathlib import Path

from managed_agents.core import ids
from managed_agents.core.settings import Settings
from managed_agents.sandbox.backend import Call, Limits, Sandbox, SandboxSpec
from managed_agents.sandbox.docker import DockerBackend
from tests.bench.figures import Figure, best, ms
from tests.bench.stack import Stack
from tests.support.sandboxes import nothing_known

ROUNDS = 3
CALLS = 60
DISK_BYTES = 256 * 1024**2


async def measure(_stack: Stack) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="ma-bench-sbx-") as directory:
        place = Path(directory)
        backend = DockerBackend(installation=f"bench{time.time_ns() % 10**8}", data_dir=place, run_dir=place / "run")
        image: str = Settings.model_fields["sandbox_image"].default
        spec = SandboxSpec(ids.new_id(ids.SANDBOX), 1, image, Limits(disk_bytes=DISK_BYTES))
        try:
            started = time.perf_counter()
            sandbox = await backend.provision(spec)
            provisioned = time.perf_counter() - started
            await calls(sandbox, 5)
            rounds = [(await calls(sandbox, CALLS), _spawns(CALLS)) for _ in range(ROUNDS)]
            await sandbox.destroy()
        finally:
            await backend.collect_orphans(nothing_known)
            await backend.aclose()
    ours, spawn = best([one for one, _ in rounds]), best([one for _, one in rounds])
    return [
        Figure(
            "warm bash call `true`, at execute()",
            f"p50 {ms(ours)} = {ours / spawn:.2f} x a spawn",
            "<= 2 x a plain spawn",
            ours <= 2 * spawn,
            f"`sh -c true` on the host: {ms(spawn)}; the container was ready after {provisioned:.2f} s",
        )
    ]


async def calls(sandbox: Sandbox, count: int) -> list[float]:
    times: list[float] = []
    for _ in range(count):
        call = Call(ids.new_id(ids.EVENT), 1, "bash", {"command": "true"})
        started = time.perf_counter()
        outcome = await sandbox.execute(call)
        times.append(time.perf_counter() - started)
        assert not outcome.is_error, outcome
        await sandbox.ack(call.tool_use_id)
    return times


def _spawns(count: int) -> list[float]:
    """Not through uvloop, which forks this whole process: the standard library's vfork is the cheapest spawn there is."""
    times: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        subprocess.run(["sh", "-c", "true"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return times
