"""Fixtures that every test may use: a real Postgres, and a migrated database of its own for each test that asks."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from managed_agents.core import faults
from managed_agents.db import databases, embedded
from managed_agents.db.engine import Database
from managed_agents.db.migrate import upgrade_blocking

TEST_DATABASE_URL = "MANAGED_AGENTS_TEST_DATABASE_URL"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A server: the one `MANAGED_AGENTS_TEST_DATABASE_URL` names, else the embedded one, started for this run."""
    if url := os.environ.get(TEST_DATABASE_URL):
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="ma-test-") as directory:
        Path(directory).chmod(0o755)
        with embedded.start_blocking(Path(directory), durable=False) as server:
            yield server.url
            server.release()
            server.wait_stopped()


@pytest.fixture(scope="session")
def template(postgres_url: str) -> Iterator[str]:
    """Name of a migrated database that nobody is connected to."""
    import anyio

    name = f"template_{uuid4().hex[:12]}"
    url = anyio.run(databases.create_database, postgres_url, name)
    upgrade_blocking(url)
    yield name
    anyio.run(databases.drop_database, postgres_url, name)


@pytest.fixture
async def database_url(postgres_url: str, template: str) -> AsyncIterator[str]:
    """A database of the test's own, cloned from the template: commits, locks and notifications are real."""
    name = f"test_{uuid4().hex[:12]}"
    url = await databases.create_database(postgres_url, name, template)
    yield url
    await databases.drop_database(postgres_url, name)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """One process's engine on `database_url`."""
    database = Database(database_url, pool=10, application_name="test")
    yield database
    await database.dispose()


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    """No armed fault point survives its test."""
    yield
    faults.disarm()
