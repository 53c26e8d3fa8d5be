"""A process that is stopped in the middle of a transaction: the server ends it, and its locks are free."""

import anyio
import pytest
from asyncpg import Connection
from sqlalchemy import text

from managed_agents.core import limits
from managed_agents.db.engine import Database

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("stopped", ["between two statements", "in the middle of one"])
async def test_the_locks_of_a_frozen_process_become_free(
    database_url: str, db: Database, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    async with db.transaction() as tx:
        await tx.execute(text("SELECT 1"))  # a connection with the usual patience, for whoever waits
    monkeypatch.setattr(limits, "FROZEN_SECONDS", 0.5)
    frozen = Database(database_url, pool=1, application_name="frozen")
    raw = await frozen.engine.raw_connection()
    connection = raw.driver_connection
    assert isinstance(connection, Connection)
    await connection.execute("BEGIN")
    await connection.execute("SELECT pg_advisory_xact_lock(7)")
    if stopped == "in the middle of one":
        await connection.prepare("SELECT 'prepared, never executed'")
    try:
        with anyio.fail_after(20):
            async with db.transaction() as tx:
                await tx.execute(text("SET LOCAL lock_timeout = '15s'"))
                await tx.execute(text("SELECT pg_advisory_xact_lock(7)"))
    finally:
        connection.terminate()
        raw.invalidate()
        await frozen.dispose()
