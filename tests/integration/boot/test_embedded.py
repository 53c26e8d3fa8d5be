"""The embedded server: shared, stopped with its last user, recovering from whatever was killed."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

from managed_agents.db import databases, embedded
from managed_agents.db.connection import connect
from managed_agents.db.embedded import EmbeddedPostgres, answers, start_blocking
from tests.integration.boot.waiting import alive, until

HOLDER = """
import sys, time
from pathlib import Path
from managed_agents.db.embedded import start_blocking
server = start_blocking(Path(sys.argv[1]), durable=False)
print(server.url, flush=True)
time.sleep(600)
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    # Not tmp_path: as root that is closed to the uid under which the server runs.
    with tempfile.TemporaryDirectory(prefix="ma-pg-") as directory:
        yield Path(directory)


def start(data_dir: Path) -> EmbeddedPostgres:
    return start_blocking(data_dir, durable=False)


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "postgres/data/postmaster.pid").read_text().split("\n", 1)[0])


def watchdog_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def execute(url: str, *statements: str) -> list[object]:
    async def run() -> list[object]:
        connection = await connect(url)
        try:
            return [await connection.fetchval(statement) for statement in statements]
        finally:
            await connection.close()

    return anyio.run(run)


def test_the_server_stops_with_its_last_lease_and_keeps_its_data(data_dir: Path) -> None:
    first, second = start(data_dir), start(data_dir)
    execute(first.url, "CREATE TABLE kept AS SELECT 42 AS n")
    first.release()
    assert execute(second.url, "SELECT n FROM kept") == [42]
    second.release()
    second.wait_stopped()
    assert not answers(data_dir / "postgres/socket")
    with start(data_dir) as again:
        assert execute(again.url, "SELECT n FROM kept") == [42]
    again.wait_stopped()


def test_a_killed_holder_gives_its_lease_back(data_dir: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(data_dir)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("postgresql://")
    pid = postmaster(data_dir)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    until(lambda: not alive(pid), "the server to stop")


def test_any_number_may_start_it_at_once(data_dir: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        servers = list(pool.map(lambda _: start(data_dir), range(6)))
    assert len({execute(server.url, "SELECT pg_postmaster_start_time()::text")[0] for server in servers}) == 1
    for server in servers:
        server.release()
    servers[0].wait_stopped()


def test_a_killed_server_recovers_what_was_committed(data_dir: Path) -> None:
    with start_blocking(data_dir) as server:
        execute(server.url, "CREATE TABLE kept AS SELECT 42 AS n")
        embedded.kill_server(data_dir / "postgres")
        until(lambda: not server.is_watched(), "the watchdog to notice")
        server.revive()
        assert execute(server.url, "SELECT n FROM kept") == [42]
    server.wait_stopped()


def test_a_server_without_its_watchdog_is_adopted(data_dir: Path) -> None:
    with start(data_dir) as server:
        pid = postmaster(data_dir)
        os.kill(watchdog_of(pid), signal.SIGKILL)
        until(lambda: not server.is_watched(), "the watchdog to be gone")
        server.revive()
        assert postmaster(data_dir) == pid
        assert server.is_watched()
    until(lambda: not alive(pid), "the adopted server to stop")


def test_server_and_watchdog_killed_together_start_again(data_dir: Path) -> None:
    with start_blocking(data_dir) as server:
        execute(server.url, "CREATE TABLE kept AS SELECT 42 AS n")
        pid = postmaster(data_dir)
        watchdog = watchdog_of(pid)
        os.kill(watchdog, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not server.is_watched(), "the watchdog to be gone")
        server.revive()
        assert execute(server.url, "SELECT n FROM kept") == [42]
    server.wait_stopped()


def test_a_stale_pid_of_somebody_else_does_not_stop_it_from_starting(data_dir: Path) -> None:
    with start(data_dir) as server:
        server.release()
        server.wait_stopped()
    pid_file = data_dir / "postgres/data/postmaster.pid"
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        pid_file.write_text(f"{stranger.pid}\n{data_dir}/postgres/data\n{int(time.time())}\n5432\n\n\n\n\n")
        with start(data_dir) as server:
            assert execute(server.url, "SELECT 1") == [1]
        server.wait_stopped()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_path_too_long_for_a_socket_gets_a_short_one(data_dir: Path) -> None:
    deep = data_dir / ("long" * 12) / ("longer" * 12)
    deep.mkdir(parents=True)
    for folder in (data_dir, data_dir / ("long" * 12), deep):
        folder.chmod(0o755)
    with start(deep) as server:
        assert execute(server.url, "SELECT 1") == [1]
        assert "managed-agents-pg-" in server.url
    server.wait_stopped()


def test_nobody_else_can_read_or_reach_it(data_dir: Path) -> None:
    with start(data_dir) as server:
        for closed in ("data", "socket"):
            assert (data_dir / "postgres" / closed).stat().st_mode & 0o077 == 0
        assert data_dir.stat().st_mode & 0o007 == 0
    server.wait_stopped()


def test_as_root_a_closed_parent_is_said_and_not_opened(data_dir: Path) -> None:
    closed = data_dir / "home"
    closed.mkdir(mode=0o700)
    if os.geteuid() == 0:
        with pytest.raises(embedded.EmbeddedPostgresError, match="MANAGED_AGENTS_DATA_DIR"):
            start(closed / "data")
    else:
        # The server runs under the caller's own uid, to which its home is open.
        with start(closed / "data") as server:
            pass
        server.wait_stopped()
    assert closed.stat().st_mode & 0o777 == 0o700


@pytest.mark.anyio
async def test_databases_are_cloned_from_a_template_and_dropped(data_dir: Path) -> None:
    with await embedded.start(data_dir, durable=False) as server:
        template = await databases.create_database(server.url, "model_db")
        connection = await connect(template)
        await connection.execute("CREATE TABLE t AS SELECT 7 AS n")
        await connection.close()
        clone = await databases.create_database(server.url, "copy_db", "model_db")
        connection = await connect(clone)
        assert await connection.fetchval("SELECT n FROM t") == 7
        await databases.drop_database(server.url, "copy_db")  # although we are still connected
        connection.terminate()
    server.wait_stopped()
