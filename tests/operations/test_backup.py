"""The documented backup of a server at work, restored elsewhere: its sessions go on there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import anyio
import pytest
from anthropic import AsyncAnthropic
from anyio import to_thread

from managed_agents.blobstore.local import LocalBlobStore
from managed_agents.db import databases
from managed_agents.db.engine import Database
from managed_agents.reconcilers.blob_collector import BlobCollector
from managed_agents.resources.files import service as files
from managed_agents.resources.sessions import clones, snapshots
from tests.operations import postgres_tools
from tests.operations.commands import blocks, run
from tests.support import cluster as clusters
from tests.support import in_flight
from tests.support.cluster import Cluster, Model
from tests.support.launcher import Launcher
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ma-copy-") as directory:
        yield Path(directory)


async def test_sessions_in_flight_go_on_in_a_restored_copy(
    postgres_url: str, database_url: str, model: Model, launcher: Launcher, elsewhere: Path
) -> None:
    tools = await postgres_tools.directory_for(postgres_url)
    variables = {"HOME": str(elsewhere), "BACKUP": str(elsewhere / "backup")}
    (back_up,), (restore, remove_sandboxes) = blocks("Back up"), blocks("Restore")
    pause = _pausing_tar(elsewhere)
    async with clusters.cluster(database_url, model, launcher) as original:
        await original.api()
        async with original.client() as client, anyio.create_task_group() as group:
            sessions = await in_flight.begin(original, client)
            environment = variables | _addresses(database_url, original.data_dir)
            group.start_soon(to_thread.run_sync, run, back_up, environment, pause, tools)
            await until((pause / "dumped").exists, seconds=60)
            try:
                await _delete_output(original, client, sessions[in_flight.RESTED])
            finally:
                (pause / "deleted").touch()

    name = f"test_{uuid4().hex[:12]}"
    copy_url = await databases.create_database(postgres_url, name)
    try:
        place = elsewhere / "data"
        environment = variables | _addresses(copy_url, place)
        for script in (remove_sandboxes, restore):
            await to_thread.run_sync(run, script, environment, tools)
        await in_flight.finish_copy(copy_url, place, model, launcher, sessions)
    finally:
        await databases.drop_database(postgres_url, name)


def _pausing_tar(directory: Path) -> Path:
    """Where a `tar` is that waits, between dump and files, until something was deleted."""
    place = directory / "bin"
    place.mkdir()
    script = f"""#!/bin/sh
    case "$*" in *-cf*) touch {place}/dumped; until test -e {place}/deleted; do sleep 0.05; done;; esac
    exec {shutil.which("tar")} "$@"
    """
    (place / "tar").write_text(script)
    (place / "tar").chmod(0o755)
    return place


async def _delete_output(server: Cluster, client: AsyncAnthropic, session_id: str) -> None:
    """Delete a session's output, whose bytes have long been there, and look for bytes that nobody refers to."""
    place = server.data_dir / "blobs"
    for blob in place.glob("??/*"):
        os.utime(blob, (0, 0))
    (output,) = [file async for file in client.beta.files.list(scope_id=session_id, betas=in_flight.BETAS)]
    await client.beta.files.delete(output.id)
    db = Database(server.database_url, pool=2, application_name="test")
    try:
        collector = BlobCollector(db, LocalBlobStore(place), [files.referenced, snapshots.referenced, clones.referenced])
        assert [await collector.look() for _ in range(2)] == [0, 0]
    finally:
        await db.dispose()


def _addresses(database_url: str, data_dir: Path) -> dict[str, str]:
    return {"MANAGED_AGENTS_DATABASE_URL": database_url, "MANAGED_AGENTS_DATA_DIR": str(data_dir)}
