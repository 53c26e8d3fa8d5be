"""The server under measurement: `managed-agents up` as a child on a data directory of its own, as a user would run it.

The scripted model is a process beside it, so that its control API can be asked when a request arrived. The server's Postgres is
shared with us by lease, for the sections that measure it directly.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from managed_agents.core.settings import Settings
from managed_agents.db import embedded
from managed_agents.sandbox.docker import DockerBackend, installation_of
from tests.support.sandboxes import nothing_known

START_SECONDS_MAX = 90.0
STOP_SECONDS_MAX = 40.0
SCRIPT = Path(__file__).with_name("script.py")
HEADERS = {"anthropic-version": "2023-06-01", "anthropic-beta": "managed-agents-2026-04-01"}


@dataclass(frozen=True)
class Stack:
    """A running server, its model and its Postgres."""

    base_url: str
    api_key: str
    model_url: str
    data_dir: Path
    postgres: embedded.EmbeddedPostgres

    @property
    def headers(self) -> dict[str, str]:
        return {**HEADERS, "x-api-key": self.api_key}

    @property
    def pids(self) -> dict[str, int]:
        """Pids of the processes that are ours: supervisor, api, worker."""
        state = json.loads((self.data_dir / "up.json").read_text())
        return {"supervisor": state["pid"], **{name: child["pid"] for name, child in state["children"].items()}}


@contextmanager
def running(data_dir: Path) -> Iterator[Stack]:
    """Start everything; stop it at the end of the block."""
    data_dir.mkdir(mode=0o755, exist_ok=True)
    model_port = free_port()
    model_url = f"http://127.0.0.1:{model_port}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MANAGED_AGENTS_", "ANTHROPIC_"))},
        "MANAGED_AGENTS_DATA_DIR": str(data_dir),
        "MANAGED_AGENTS_PORT": "0",
        "MANAGED_AGENTS_MODEL_BASE_URL": model_url,
        "MANAGED_AGENTS_MODEL_API_KEY": "scripted",
        "MANAGED_AGENTS_LOG_LEVEL": "warning",
        "MANAGED_AGENTS_RATE_LIMITS": "off",
        "MANAGED_AGENTS_WORKER_TURNS": "600",  # the section `waiting` has 500 sessions in one worker
        "MANAGED_AGENTS_SUPERVISED": "1",  # both end with us, however we end
    }
    command = [sys.executable, "-m", "managed_agents.cli.main"]
    with embedded.start_blocking(data_dir) as postgres, (data_dir / "up.log").open("wb") as log:
        children = [
            subprocess.Popen([*command, *arguments], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
            for arguments in (["scripted-model", "--port", str(model_port), "--script", str(SCRIPT)], ["up"])
        ]
        try:
            state = _wait_ready(children[1], data_dir)
            wait_listening(model_port)
            yield Stack(state["base_url"], (data_dir / "api_key").read_text().strip(), model_url, data_dir, postgres)
        except BaseException:
            print((data_dir / "up.log").read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            for child in reversed(children):
                child.terminate()
                child.wait(STOP_SECONDS_MAX)
            # The directory is removed next, and after a million events the last checkpoint takes a while.
            postgres.release()
            postgres.wait_stopped()
            anyio.run(_remove_sandboxes, data_dir)


async def _remove_sandboxes(data_dir: Path) -> None:
    """The server stops them and keeps them for its next start, which there is none of."""
    run_dir = Settings(data_dir=data_dir).effective_run_dir
    backend = DockerBackend(installation=installation_of(data_dir), data_dir=data_dir, run_dir=run_dir)
    try:
        await backend.collect_orphans(nothing_known)
    finally:
        await backend.aclose()


def _wait_ready(process: "subprocess.Popen[bytes]", data_dir: Path) -> dict[str, Any]:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        path = data_dir / "up.json"
        state = json.loads(path.read_text()) if path.exists() else {"ready": False}
        if state["ready"]:
            return state
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{(data_dir / 'up.log').read_text()[-4000:]}")


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_listening(port: int) -> None:
    """Return once somebody listens there."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"nobody listens on port {port}")
