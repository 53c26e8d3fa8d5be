"""Sandboxes: a first call, cold and from a pool, beside `docker run` of the image; bytes through the runner; many at once."""

import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import anyio

from managed_agents.core import ids
from managed_agents.core.settings import Settings
from managed_agents.sandbox.backend import Call, Limits, Sandbox, SandboxSpec
from managed_agents.sandbox.docker import DockerBackend
from tests.bench.figures import Figure, best, ms
from tests.bench.stack import Stack
from tests.support.sandboxes import nothing_known

ROUNDS = 5
AT_ONCE = 20
MIB = 1024**2
COLD_RATIO_MAX = 1.5
POOLED_SECONDS_MAX = 0.05
MIB_SECONDS_MAX = 0.015


async def measure(_stack: Stack) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="ma-bench-sbx-") as directory:
        place = Path(directory)
        backend = DockerBackend(installation=f"bench{time.time_ns() % 10**8}", data_dir=place, run_dir=place / "run")
        image: str = Settings.model_fields["sandbox_image"].default
        like = SandboxSpec("", 1, image, Limits(disk_bytes=256 * MIB), "gateway")
        try:
            rounds = [(await _cold(backend, like), _docker_run(image)) for _ in range(ROUNDS)]
            pooled = [await _pooled(backend, like) for _ in range(ROUNDS)]
            through = await _through(backend, like)
            at_once, parked = await _many(backend, like, place)
        finally:
            await backend.collect_orphans(nothing_known)
            await backend.aclose()
    cold, run = min(ours for ours, _ in rounds), min(theirs for _, theirs in rounds)
    return [
        Figure(
            "first call of a cold sandbox",
            f"{ms(cold)} = {cold / run:.2f} x docker run",
            f"<= {COLD_RATIO_MAX} x docker run",
            cold <= COLD_RATIO_MAX * run,
            f"`docker run --rm IMAGE true`, hardened alike: {ms(run)}",
        ),
        Figure(
            "first call of a sandbox made ahead",
            f"p50 {ms(best([pooled]))}",
            f"<= {ms(POOLED_SECONDS_MAX)}",
            best([pooled]) <= POOLED_SECONDS_MAX,
        ),
        Figure(
            "1 MiB into a sandbox, and out of it",
            f"p50 {ms(through)} the slower way",
            f"<= {ms(MIB_SECONDS_MAX)}",
            through <= MIB_SECONDS_MAX,
        ),
        Figure(
            f"{AT_ONCE} sandboxes, two made at a time, a call in each at once",
            f"all made in {at_once:.1f} s = {AT_ONCE / at_once:.1f} /s",
            "all answer",
            True,
        ),
        Figure(f"processes of {AT_ONCE} parked sandboxes", str(parked), "0", parked == 0),
    ]


async def _call(sandbox: Sandbox) -> None:
    outcome = await sandbox.execute(Call(ids.new_id(ids.EVENT), 1, "bash", {"command": "true"}))
    assert not outcome.is_error, outcome


def _named(like: SandboxSpec) -> SandboxSpec:
    return replace(like, id=ids.new_id(ids.SANDBOX))


async def _cold(backend: DockerBackend, like: SandboxSpec) -> float:
    started = time.perf_counter()
    sandbox = await backend.provision(_named(like))
    await _call(sandbox)
    seconds = time.perf_counter() - started
    await sandbox.destroy()
    return seconds


async def _pooled(backend: DockerBackend, like: SandboxSpec) -> float:
    """What adopting one does at the engine; its row costs one of the transactions that binding does anyway."""
    spec = _named(like)
    await (await backend.provision(spec)).aclose()
    started = time.perf_counter()
    sandbox = await backend.provision(spec)
    await _call(sandbox)
    seconds = time.perf_counter() - started
    await sandbox.destroy()
    return seconds


def _docker_run(image: str) -> float:
    hardened = ("--network=none", "--read-only", "--init", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--memory=8g")
    started = time.perf_counter()
    subprocess.run(["docker", "run", "--rm", *hardened, "--label=managed-agents-bench", image, "true"], check=True, timeout=60)
    return time.perf_counter() - started


async def _through(backend: DockerBackend, like: SandboxSpec) -> float:
    sandbox = await backend.provision(_named(like))
    data = bytes(MIB)
    into: list[float] = []
    out: list[float] = []
    for _ in range(15):
        started = time.perf_counter()
        await sandbox.put("/workspace/data", data, "agent")
        into.append(time.perf_counter() - started)
        started = time.perf_counter()
        size = sum([len(chunk) async for chunk in sandbox.get("/workspace/data")])
        out.append(time.perf_counter() - started)
        assert size == MIB
    await sandbox.destroy()
    return max(best([into]), best([out]))


async def _many(backend: DockerBackend, like: SandboxSpec, place: Path) -> tuple[float, int]:
    made: list[Sandbox] = []
    limiter = anyio.CapacityLimiter(2)  # as a worker does: `harness.hands.PROVISIONS_AT_ONCE`

    async def make() -> None:
        async with limiter:
            made.append(await backend.provision(_named(like)))

    started = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(AT_ONCE):
            group.start_soon(make)
    seconds = time.perf_counter() - started
    async with anyio.create_task_group() as group:
        for sandbox in made:
            group.start_soon(_call, sandbox)
    async with anyio.create_task_group() as group:
        for sandbox in made:
            group.start_soon(sandbox.stop)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    ours = [each for each in await backend.list() if each.running]
    return seconds, len(ours) + sum(str(place).encode() in command for command in commands)
