"""Starts `managed-agents` processes quickly: it imports the server once and forks.

Importing costs seconds of CPU, and crash tests start processes by the hundred. A fork of a program that has imported
everything and started nothing is the same process as `python -m managed_agents.cli.main …`: own pid, session, environment
and log; only the imports are inherited. Children die with the launcher, and the launcher with the end of its input.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_PR_SET_PDEATHSIG = 1


class Launcher:
    """The test's end: one question, one answer."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin: IO[str] = process.stdin
        self._stdout: IO[str] = process.stdout

    def _ask(self, question: dict[str, Any]) -> Any:
        self._stdin.write(json.dumps(question) + "\n")
        self._stdin.flush()
        answer = self._stdout.readline()
        assert answer, "the launcher ended"
        return json.loads(answer)

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> int:
        """Start `managed-agents ARGUMENTS` and return its pid."""
        return self._ask({"arguments": arguments, "environment": environment, "log": str(log)})

    def status(self, pid: int, log: Path) -> int | None:
        """How the process with this log ended: exit status, or minus the signal; None while it lives."""
        return self._ask({"pid": pid, "log": str(log)})


@contextmanager
def launcher() -> Iterator[Launcher]:
    """Run one until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.launcher"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    ) as process:
        yield Launcher(process)


def main() -> None:
    """The launcher's end."""
    from managed_agents.cli import main as command
    from managed_agents.processes import api, worker

    assert api
    assert worker
    # By log too: in a long test pids come round again.
    statuses: dict[tuple[int, str], int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if (pid := question.get("pid")) is not None:
            asked = (pid, question["log"])
            if asked not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found == pid:
                    statuses[asked] = os.waitstatus_to_exitcode(status)
            answer = statuses.get(asked)
        else:
            answer = os.fork()
            if answer == 0:
                _become(question["environment"], question["log"])
                command.main(question["arguments"], prog_name="managed-agents")
        print(json.dumps(answer), flush=True)


def _become(environment: dict[str, str], log: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)


if __name__ == "__main__":
    main()
