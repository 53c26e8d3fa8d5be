"""`managed-agents up`, as its user meets it: ready, restarting what dies, stopping all of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.integration.boot.waiting import alive, until
from tests.support.small_disk import fill, small_disk

UP = [sys.executable, "-m", "managed_agents.cli.main", "up", "--sandbox", "local"]
RSS_MAX_BYTES = 260 * 1024 * 1024


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ma-up-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def environment(data_dir: Path) -> dict[str, str]:
    ours = {"MANAGED_AGENTS_DATA_DIR": str(data_dir), "MANAGED_AGENTS_PORT": "0"}
    return {k: v for k, v in os.environ.items() if not k.startswith(("MANAGED_AGENTS_", "ANTHROPIC_"))} | ours


def state(data_dir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((data_dir / "up.json").read_text())
    except FileNotFoundError:
        return None


def pids(data_dir: Path) -> dict[str, int]:
    now = state(data_dir)
    assert now is not None
    postmaster = int((data_dir / "postgres/data/postmaster.pid").read_text().split("\n", 1)[0])
    children = {name: child["pid"] for name, child in now["children"].items()}
    return {"up": now["pid"], "postgres": postmaster, **children}


@contextmanager
def up(data_dir: Path, **settings: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A ready server."""
    with (data_dir / "log").open("wb") as log:
        process = subprocess.Popen(UP, env=environment(data_dir) | settings, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        until(lambda: _ready(process, data_dir), "the server to be ready", 90)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=60)


def _ready(process: "subprocess.Popen[bytes]", data_dir: Path) -> bool:
    assert process.poll() is None, (data_dir / "log").read_text()
    now = state(data_dir)
    return now is not None and now["ready"]


def rss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def test_a_stopped_server_leaves_no_process_behind_and_keeps_its_key(data_dir: Path) -> None:
    with up(data_dir) as process:
        running = pids(data_dir)
        key = (data_dir / "api_key").read_text()
        assert (data_dir / "api_key").stat().st_mode & 0o777 == 0o600
        assert (data_dir / "master.key").stat().st_mode & 0o777 == 0o600
        process.terminate()
        assert process.wait(timeout=30) == 0
    for name, pid in running.items():
        until(lambda pid=pid: not alive(pid), f"{name} to end", 20)
    output = (data_dir / "log").read_text()
    assert "SCRIPTED MODEL" in output
    assert key.strip() in output
    with up(data_dir):
        assert (data_dir / "api_key").read_text() == key


def test_a_killed_worker_and_a_killed_postgres_start_again(data_dir: Path) -> None:
    with up(data_dir):
        before = pids(data_dir)
        os.kill(before["worker"], signal.SIGKILL)
        os.kill(before["postgres"], signal.SIGKILL)
        until(lambda: _restarted(data_dir, before), "both to be back", 60)
        now = state(data_dir)
        assert now is not None
        until(lambda: _answers(now["base_url"]), "the API to be ready again", 60)
    assert "killed by SIGKILL" in (data_dir / "log").read_text()


def _restarted(data_dir: Path, before: dict[str, int]) -> bool:
    try:
        now = pids(data_dir)
    except (FileNotFoundError, ValueError):
        return False  # the new server has not written its pid yet
    return all(now[name] and now[name] != before[name] and alive(now[name]) for name in ("worker", "postgres"))


def _answers(base_url: str) -> bool:
    try:
        with urlopen(f"{base_url}/readyz", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def test_nothing_outlives_a_killed_supervisor(data_dir: Path) -> None:
    with up(data_dir) as process:
        running = pids(data_dir)
        process.kill()
    for name, pid in running.items():
        until(lambda pid=pid: not alive(pid), f"{name} to end", 40)


@pytest.mark.anyio
async def test_a_full_disk_stops_neither_the_supervisor_nor_what_it_starts_again(database_url: str) -> None:
    with small_disk(8) as data_dir, up(data_dir, MANAGED_AGENTS_DATABASE_URL=database_url) as process:
        before = state(data_dir)
        assert before is not None
        filler = fill(data_dir)
        worker = before["children"]["worker"]["pid"]
        os.kill(worker, signal.SIGKILL)
        until(lambda: [pid for pid in _workers(process.pid) if pid != worker], "the worker to be back", 60)
        filler.unlink()
        until(lambda: _restarts(data_dir) == 1, "the restart to be recorded", 30)
        assert process.poll() is None


def _workers(parent: int) -> list[int]:
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [pid for pid in children if alive(pid) and b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _restarts(data_dir: Path) -> int:
    now = state(data_dir)
    return 0 if now is None else now["children"]["worker"]["restarts"]


def test_it_says_when_the_port_is_taken(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*UP, "--port", port], env=environment(data_dir), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr


def test_one_data_directory_has_one_supervisor_and_rest_is_small(data_dir: Path) -> None:
    with up(data_dir):
        second = subprocess.run(UP, env=environment(data_dir), capture_output=True, text=True, timeout=60)
        assert second.returncode == 1
        assert "runs already" in second.stderr
        # As in the target: supervisor, api and worker, without Postgres and the scripted model.
        counted = {name: rss_bytes(pid) for name, pid in pids(data_dir).items() if name in ("up", "api", "worker")}
        assert sum(counted.values()) <= RSS_MAX_BYTES, counted
