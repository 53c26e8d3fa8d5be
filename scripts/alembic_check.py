"""`alembic check` against a fresh, migrated database: fails when a table was changed without a migration."""

import os
import sys
import tempfile
from pathlib import Path

from managed_agents.db import embedded, migrate


def main() -> int:
    if database_url := os.environ.get("MANAGED_AGENTS_CHECK_DATABASE_URL"):
        check(database_url)
        return 0
    with tempfile.TemporaryDirectory(prefix="ma-check-") as folder:
        with embedded.start_blocking(Path(folder), durable=False) as server:
            check(server.url)
        server.wait_stopped()
    return 0


def check(database_url: str) -> None:
    migrate.upgrade_blocking(database_url)
    migrate.check_blocking(database_url)


if __name__ == "__main__":
    sys.exit(main())
