"""docs/operations/crash-matrix.md, written by the run that has filled the matrix."""

import importlib
import pkgutil
from pathlib import Path

import managed_agents
from managed_agents.core import faults
from tests.crash.matrix.scenarios import PASSED, SCENARIOS, points

PATH = Path(__file__).parents[3] / "docs" / "operations" / "crash-matrix.md"
# Points that no worker passes while it does a session's work, and where they are tested.
ELSEWHERE = {
    "hands.cloned": "tests/crash/test_docker.py",
    "clone.stored": "tests/crash/test_docker.py",
    "clone.recorded": "tests/crash/test_docker.py",
    "hands.restored": "tests/crash/test_sandbox_lost.py",
    "snapshot.stored": "tests/crash/test_sandbox_lost.py",
    "idempotency.committed": "tests/crash/test_idempotency.py",
    "worker.freed": "tests/crash/test_drain.py",
    "pool.recorded": "tests/crash/test_outages.py",
    "pool.made": "tests/crash/test_outages.py",
    "worker.gave_back": "tests/crash/test_drain.py",
}
INTRODUCTION = """# Crash matrix

<!-- written by the tests: make test-full ARGS=tests/crash/matrix -->

What happens when a worker dies, at every place where it could matter. Each row is a fault point: after a commit, or before or
after a call to something else (the model, a sandbox, the blob store). Each column is a scenario. The figure says how often an
undisturbed run passes the point; at each of these passages the tests end a worker twice, once by an exception that went up
through all of it and once by `kill -9`, and let another worker go on.

What has to hold in every one of these {cases:,} cases:

- the final log equals that of undisturbed work after this normalisation: ids and times; usage figures; model requests that the
  crash cut off (their failed span pair); results of calls that ran side by side in the order of the calls; in the scenario
  `retry` the retries, because the try that a crash swallowed may have been the one that failed;
- the stream that a client followed is the history, event for event;
- the folded columns are the fold of the log, `seq` has no gaps, nothing waits and nobody owns the session;
- the command that counts its runs has run exactly once, the denied one never.

`make test` runs each point of each scenario once as an exception, at one of its passages, and each point once as a `kill -9`, in
one of the scenarios; `make test-full` all of it.
"""


def import_everything() -> None:
    """Fault points register where they are imported."""
    for module in pkgutil.walk_packages(managed_agents.__path__, "managed_agents."):
        if not module.name.endswith((".runner.main", ".zygote")):
            importlib.import_module(module.name)


def text() -> str:
    """The whole page."""
    import_everything()
    cases = 2 * sum(sum(points(name).values()) for name in SCENARIOS)
    lines = [INTRODUCTION.format(cases=cases), "| Scenario | What happens |", "|---|---|"]
    lines += [f"| {name} | {scenario.what} |" for name, scenario in SCENARIOS.items()]
    lines += ["", f"| Fault point | Where | {' | '.join(SCENARIOS)} |", "|---|---|" + "---:|" * len(SCENARIOS)]
    for point in PASSED:
        figures = [str(points(name).get(point, "")) for name in SCENARIOS]
        lines.append(f"| `{point}` | {faults.REGISTERED[point]} | {' | '.join(figures)} |")
    lines += [
        "",
        "Points that no worker passes while it works on a session:",
        "",
        "| Fault point | Where | Tested in |",
        "|---|---|---|",
    ]
    lines += [f"| `{point}` | {faults.REGISTERED[point]} | {where} |" for point, where in ELSEWHERE.items()]
    lines += [
        "",
        "An api process that dies while it accepts events: tests/crash/test_fault_points.py. Workers that are frozen, cut off",
        "from the database or told to stop, and whole hosts' worth of sessions: the other files of tests/crash.",
    ]
    return "\n".join(lines) + "\n"
