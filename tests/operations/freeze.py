"""Keep the schema of a release as a fixture: `python -m tests.operations.freeze`, once, when it is made.

Writes `releases/<revision>/`: a dump with sessions in flight made by this very code, its master key, its blobs and the
sessions' ids. The dump has nothing that depends on the server's version.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import anyio

from managed_agents.db import databases, embedded
from managed_agents.db.migrate import upgrade_blocking
from managed_agents.db.revisions import revisions
from tests.operations import postgres_tools
from tests.support import cluster as clusters
from tests.support import in_flight
from tests.support.launcher import launcher

RELEASES = Path(__file__).parent / "releases"
VERSION_DEPENDENT = ("SET transaction_timeout", "\\restrict", "\\unrestrict", "-- Dumped")


async def freeze(server_url: str, database_url: str) -> None:
    """Fill the database, and keep what it then has."""
    place = RELEASES / revisions().head
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    tools = await postgres_tools.directory_for(server_url)
    with launcher() as launch:
        async with (
            clusters.scripted_model(in_flight.interrupted) as model,
            clusters.cluster(database_url, model, launch) as server,
        ):
            await server.api()
            async with server.client() as client:
                sessions = await in_flight.begin(server, client)
            dump = [tools / "pg_dump", "--no-owner", "--no-privileges", database_url]
            with anyio.fail_after(60):
                done = await anyio.run_process([str(part) for part in dump])
            lines = done.stdout.decode().splitlines()
            kept = [line for line in lines if not line.startswith(VERSION_DEPENDENT)]
            (place / "database.sql").write_text("\n".join(kept) + "\n")
            (place / "sessions.json").write_text(json.dumps(sessions, indent=1) + "\n")
            shutil.copyfile(server.data_dir / "master.key", place / "master.key")
            shutil.copytree(server.data_dir / "blobs", place / "blobs", ignore=shutil.ignore_patterns("drafts"))


def main() -> None:
    """Make the fixture of this checkout's schema."""
    with tempfile.TemporaryDirectory(prefix="ma-freeze-") as directory:
        Path(directory).chmod(0o755)
        with embedded.start_blocking(Path(directory), durable=False) as server:
            url = anyio.run(databases.create_database, server.url, "frozen")
            upgrade_blocking(url)
            anyio.run(freeze, server.url, url)
            server.release()
            server.wait_stopped()
    subprocess.run(["du", "-sh", RELEASES], check=True)


if __name__ == "__main__":
    main()
