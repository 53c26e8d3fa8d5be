"""The documented backup of a server at work, restored elsewhere: its sessions go on there."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from anyio import to_thread

from managed_agents.db import databases
from tests.operations import postgres_tools
from tests.operations.commands import blocks, run
from tests.support import cluster as clusters
from tests.support import in_flight
from tests.support.cluster import Model
from tests.support.launcher import Launcher

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
    async with clusters.cluster(database_url, model, launcher) as original:
        await original.api()
        async with original.client() as client:
            sessions = await in_flight.begin(original, client)
        await to_thread.run_sync(run, back_up, variables | _addresses(database_url, original.data_dir), tools)

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


def _addresses(database_url: str, data_dir: Path) -> dict[str, str]:
    return {"MANAGED_AGENTS_DATABASE_URL": database_url, "MANAGED_AGENTS_DATA_DIR": str(data_dir)}
