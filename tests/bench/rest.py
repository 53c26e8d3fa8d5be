"""What the server costs while nothing happens: memory of its own processes, processor time, and growth by parked sessions."""

import asyncio
import os
from pathlib import Path

from tests.bench import turns
from tests.bench.figures import Figure
from tests.bench.stack import Stack

PARKED = 1000
AT_ONCE = 100
REST_SECONDS = 15.0
SETTLE_SECONDS = 2.0
MIB = 1024**2
OURS_MIB_MAX = 260
GROWTH_MIB_MAX = 5
IDLE_SHARE_MAX = 0.01


async def measure(stack: Stack) -> list[Figure]:
    await asyncio.sleep(SETTLE_SECONDS)
    before = {name: pss(pid) for name, pid in stack.pids.items()}
    shares = await _idle_shares(stack)
    async with turns.benching(stack) as bench:
        # The first turns fill caches and pools that stay: they are not what a session costs.
        for _ in range(4):
            await turns.at_once(bench, AT_ONCE)
        await asyncio.sleep(SETTLE_SECONDS)
        warm = {name: pss(pid) for name, pid in stack.pids.items()}
        for _ in range(PARKED // AT_ONCE):
            await turns.at_once(bench, AT_ONCE)
    await asyncio.sleep(SETTLE_SECONDS)
    after = {name: pss(pid) for name, pid in stack.pids.items()}
    total, growth = sum(before.values()), sum(after.values()) - sum(warm.values())
    busiest = max(shares.values())
    return [
        Figure(
            "memory of supervisor, api and worker at rest (PSS)",
            f"{total / MIB:.0f} MiB ({_each(before)})",
            f"<= {OURS_MIB_MAX} MiB",
            total <= OURS_MIB_MAX * MIB,
        ),
        Figure(
            f"growth by {PARKED:,} parked sessions, a turn each",
            f"{growth / MIB:+.1f} MiB (warm: {_each(warm)})",
            f"<= +{GROWTH_MIB_MAX} MiB",
            growth <= GROWTH_MIB_MAX * MIB,
        ),
        Figure(
            "processor time at rest",
            ", ".join(f"{name} {share * 100:.2f} %" for name, share in shares.items()),
            "each < 1 % of a core",
            busiest < IDLE_SHARE_MAX,
        ),
    ]


def _each(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / MIB:.0f}" for name, size in sizes.items())


def pss(pid: int) -> int:
    """Bytes of a process, shared pages divided among their users."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in smaps_rollup")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _idle_shares(stack: Stack) -> dict[str, float]:
    pids = stack.pids
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    await asyncio.sleep(REST_SECONDS)
    return {name: (cpu_seconds(pid) - before[name]) / REST_SECONDS for name, pid in pids.items()}
