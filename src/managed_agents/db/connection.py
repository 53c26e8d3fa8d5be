"""Plain asyncpg connections outside the pool: for notifications and for the worker's sign of life."""

from typing import Any, cast

import asyncpg

from managed_agents.db.engine import asyncpg_arguments

TROUBLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)
"""What using such a connection may raise when the database is away or the connection is lost.

`InternalClientError` is what asyncpg says when the server's goodbye crosses our statement.
"""


async def connect(database_url: str) -> Any:
    """Open a connection (asyncpg has no type information). The caller terminates it. Raises one of `TROUBLE`."""
    return await cast(Any, asyncpg).connect(**asyncpg_arguments(database_url))
