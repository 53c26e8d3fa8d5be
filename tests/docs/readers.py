"""What a reader does with a page: one bash and one Python, kept open, into which its examples are pasted one by one.

`curl` in that bash also reports each answer's status, and an error status ends the example unless it is expected.
"""

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.docs.pages import Example

EXAMPLE_SECONDS_MAX = 90.0
DONE = "--- the example is over ---"

_BASH = r"""
set -euo pipefail
curl() { command curl --fail-with-body -w '%{stderr}answered %{http_code}\n' "$@" || return $?; }
while read -r example; do
  source "$example" </dev/null
  echo; echo "$DONE"; echo "$DONE" >&2
done
"""

_PYTHON = r"""
import os, sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    path = line.strip()
    with open(path) as file:
        exec(compile(file.read(), path, "exec"), names)
    for stream in (sys.stdout, sys.stderr):
        print(os.environ["DONE"], file=stream, flush=True)
"""

_COMMANDS = {"bash": ["bash", "-c", _BASH], "python": [sys.executable, "-c", _PYTHON]}


@dataclass(frozen=True)
class Answer:
    """What an example printed, and whether it came to its end."""

    out: str
    err: str
    finished: bool

    @property
    def statuses(self) -> list[int]:
        """HTTP statuses of the example's `curl`s."""
        return [int(line.split()[1]) for line in self.err.splitlines() if line.startswith("answered ")]


class Interpreter:
    """One open bash or Python."""

    def __init__(self, language: str, environment: Mapping[str, str], directory: Path) -> None:
        self._directory = directory
        self._process = subprocess.Popen(
            _COMMANDS[language],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
            env={**environment, "DONE": DONE},
        )

    def paste(self, example: Example) -> Answer:
        """Run one example to its end; a reader that waits too long gives up."""
        assert self._process.stdin is not None
        with tempfile.NamedTemporaryFile("w", dir=self._directory, prefix="example-", delete=False) as file:
            file.write(example.code)
        self._process.stdin.write(file.name + "\n")
        self._process.stdin.flush()
        giving_up = threading.Timer(EXAMPLE_SECONDS_MAX, self._process.kill)
        giving_up.start()
        errors: list[str] = []
        reading = threading.Thread(target=lambda: errors.extend(_until_done(self._process.stderr)))
        reading.start()
        out = _until_done(self._process.stdout)
        reading.join()
        giving_up.cancel()
        finished = bool(out) and out[-1] == DONE
        return Answer("\n".join(out), "\n".join(errors), finished)

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


def _until_done(stream: "IO[str] | None") -> list[str]:
    """Lines up to and with the mark, or to the end when the interpreter gave up."""
    assert stream is not None
    lines: list[str] = []
    for line in stream:
        lines.append(line.rstrip("\n"))
        if lines[-1] == DONE:
            break
    return lines


@contextlib.contextmanager
def reader(environment: Mapping[str, str], directory: Path) -> Generator[dict[str, Interpreter]]:
    """Open one interpreter of each language."""
    interpreters = {language: Interpreter(language, environment, directory) for language in _COMMANDS}
    try:
        yield interpreters
    finally:
        for interpreter in interpreters.values():
            interpreter.close()
