"""A server as a reader of the README runs it: `managed-agents up`, embedded Postgres, scripted model."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS_MAX = 90.0
STOP_SECONDS_MAX = 40.0
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Running:
    """A server that answers, and the environment of a reader who uses it."""

    base_url: str
    api_key: str

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of ours leaks into the examples: they must work in a bare shell with the project's Python first."""
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        return {
            "PATH": path,
            "HOME": os.environ.get("HOME", "/"),
            "LANG": "C.UTF-8",
            "BASE_URL": self.base_url,
            "API_KEY": self.api_key,
        }


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """One server for all pages. Its log is shown when it does not come up."""
    directory = Path(tempfile.mkdtemp(prefix="ma-docs-"))
    directory.chmod(0o755)  # embedded Postgres has a uid of its own when we are root
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "MANAGED_AGENTS_DATA_DIR": str(directory / "data"),
        "MANAGED_AGENTS_PORT": "0",
        "MANAGED_AGENTS_SANDBOX": "local",
    }
    log_path = directory / "up.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "managed_agents.cli.main", "up"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        base_url = _wait_ready(process, directory / "data" / "up.json", log_path)
        yield Running(base_url, (directory / "data" / "api_key").read_text().strip())
    finally:
        process.terminate()
        process.wait(STOP_SECONDS_MAX)
        _end_sandboxes(directory / "data")
        shutil.rmtree(directory, ignore_errors=True)


def _wait_ready(process: "subprocess.Popen[bytes]", state_path: Path, log_path: Path) -> str:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        if state_path.exists() and (state := json.loads(state_path.read_text()))["ready"]:
            return state["base_url"]
        assert process.poll() is None, log_path.read_text()
        assert time.monotonic() < deadline, log_path.read_text()
        time.sleep(LOOK_SECONDS)


def _end_sandboxes(data_dir: Path) -> None:
    """Sandboxes outlive their server on purpose; those of a test must not."""
    for pid in data_dir.glob("sandboxes/*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
