"""Databases of a server: made from a template, dropped, addressed by URL. Tests clone a migrated template with them."""

from sqlalchemy.engine import make_url

from managed_agents.core import limits
from managed_agents.db.connection import connect


def with_database(database_url: str, name: str) -> str:
    """The same server's URL for another database."""
    return make_url(database_url).set(database=name).render_as_string(hide_password=False)


async def create_database(database_url: str, name: str, template: str = "template1") -> str:
    """Create a database on the server of `database_url` as a copy of `template` and return its URL.

    Nobody may be connected to `template` meanwhile.
    """
    await _execute(database_url, f'CREATE DATABASE "{_checked(name)}" TEMPLATE "{_checked(template)}"')
    return with_database(database_url, name)


async def drop_database(database_url: str, name: str) -> None:
    """Drop a database, ending whatever connections it has. Repeating is safe."""
    await _execute(database_url, f'DROP DATABASE IF EXISTS "{_checked(name)}" WITH (FORCE)')


def _checked(name: str) -> str:
    if not name.replace("_", "").isalnum() or len(name) > 63:
        raise ValueError(f"not a database name of ours: {name!r}")
    return name


async def _execute(database_url: str, statement: str) -> None:
    connection = await connect(database_url)
    try:
        await connection.execute(statement, timeout=limits.DATABASE_STATEMENT_SECONDS)
    finally:
        await connection.close(timeout=limits.DATABASE_CONNECT_SECONDS)
