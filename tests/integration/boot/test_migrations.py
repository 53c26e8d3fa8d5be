"""Migrations from code: one at a time, repeatable, and the same as the tables."""

import subprocess
import sys
from uuid import uuid4

import anyio

from managed_agents.db import databases, migrate

MIGRATE = "import sys; from managed_agents.db.migrate import upgrade_blocking; upgrade_blocking(sys.argv[1])"


def test_any_number_may_migrate_at_once_and_the_tables_match(postgres_url: str) -> None:
    name = f"migrate_{uuid4().hex[:12]}"
    url = anyio.run(databases.create_database, postgres_url, name)
    try:
        processes = [subprocess.Popen([sys.executable, "-c", MIGRATE, url]) for _ in range(3)]
        assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
        migrate.check_blocking(url)
    finally:
        anyio.run(databases.drop_database, postgres_url, name)
