"""Alembic's environment: one migrating process at a time, short locks.

A session-level advisory lock lets any number of processes call `upgrade` at start; the losers find nothing to do. A
statement that waits longer than the lock timeout for a table fails the migration rather than queueing everybody behind
it; running it again is safe.
"""

import asyncio
import importlib
import os
from pathlib import Path

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import managed_agents
from managed_agents.core import limits
from managed_agents.db.engine import Base, sqlalchemy_url

ADVISORY_LOCK = 0x6D61_6D69_6772  # "mamigr"
WAIT_FOR_OTHERS_SECONDS = 120


def import_tables() -> None:
    """Import every module named `tables`, so that new ones come along."""
    package = Path(managed_agents.__file__).parent
    for path in sorted(package.rglob("tables.py")):
        importlib.import_module(".".join(("managed_agents", *path.relative_to(package).with_suffix("").parts)))


def migrate(connection: Connection) -> None:
    """Run the migrations of the current command on `connection`."""
    connection.execute(text(f"SET lock_timeout = '{WAIT_FOR_OTHERS_SECONDS}s'"))
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
    connection.execute(text(f"SET lock_timeout = '{int(limits.LOCK_TIMEOUT_SECONDS * 1000)}ms'"))
    connection.commit()
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


async def main() -> None:
    """Connect, migrate, disconnect: closing the connection frees the advisory lock."""
    database_url = context.config.attributes.get("database_url") or os.environ["MANAGED_AGENTS_DATABASE_URL"]
    engine = create_async_engine(
        sqlalchemy_url(database_url),
        poolclass=NullPool,
        connect_args={"timeout": limits.DATABASE_CONNECT_SECONDS},
    )
    try:
        async with engine.connect() as connection:
            await connection.run_sync(migrate)
    finally:
        await engine.dispose()


import_tables()
asyncio.run(main())
