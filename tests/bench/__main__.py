"""`python -m tests.bench`: all sections, or `--only` some. Always exit status 0 unless something broke.

Latencies are the best of three rounds' percentiles, throughputs the best of three: other load on the machine only ever adds.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import anyio

from managed_agents.processes.lifetime import settle_memory
from tests.bench import egress, egress_tls, lists, log, requests, rest, rounds, stream, tools, turns, waiting
from tests.bench.figures import Figure
from tests.bench.stack import Stack, running

SECTIONS: dict[str, Callable[[Stack], Awaitable[list[Figure]]]] = {
    "rest": rest.measure,  # first: a server at rest has done nothing yet
    "requests": requests.measure,
    "turns": turns.measure,
    "log": log.measure,
    "lists": lists.measure,
    "stream": stream.measure,
    "tools": tools.measure,
    "rounds": rounds.measure,
    "egress": egress.measure,
    "egress-tls": egress_tls.measure,
    "waiting": waiting.measure,  # last: what it leaves in memory is nobody else's figure
}
LATEST = Path(".bench/latest.json")
SECTION_SECONDS_MAX = 150.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Speed against the targets, each beside a raw "
                                     "baseline of the same run.")  # fmt: skip
    parser.add_argument("--only", action="append", choices=SECTIONS, metavar="SECTION", help=f"one of {', '.join(SECTIONS)}")
    wanted: list[str] = parser.parse_args().only or list(SECTIONS)
    started = time.monotonic()
    results: dict[str, list[Figure]] = {}
    with tempfile.TemporaryDirectory(prefix="ma-bench-") as directory:
        Path(directory).chmod(0o755)  # as root, Postgres runs under another uid
        with running(Path(directory) / "data") as stack:
            settle_memory()
            for name in wanted:
                print(f"{name} (load {os.getloadavg()[0]:.1f})", flush=True)
                results[name] = anyio.run(_bounded, SECTIONS[name], stack, backend_options={"use_uvloop": True})
                for figure in results[name]:
                    print(figure.line(), flush=True)
    figures = [figure for section in results.values() for figure in section]
    missed = sum(not figure.met for figure in figures)
    print(f"{len(figures) - missed} of {len(figures)} targets met in {time.monotonic() - started:.0f} s")
    _write(results)
    return 0


async def _bounded(section: Callable[[Stack], Awaitable[list[Figure]]], stack: Stack) -> list[Figure]:
    with anyio.fail_after(SECTION_SECONDS_MAX):
        return await section(stack)


def _write(results: dict[str, list[Figure]]) -> None:
    LATEST.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
    sections = {name: [dataclasses.asdict(figure) for figure in figures] for name, figures in results.items()}
    at = datetime.now(UTC).isoformat(timespec="seconds")
    LATEST.write_text(json.dumps({"at": at, "machine": machine, "sections": sections}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
