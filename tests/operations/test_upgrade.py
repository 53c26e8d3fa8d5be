"""Every earlier release's database, with its sessions in flight, upgraded by the documented command: the sessions go on."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from anyio import to_thread

from managed_agents.api.health import unready_reason
from managed_agents.db import databases, migrate
from managed_agents.db.engine import Database
from managed_agents.db.revisions import revisions
from tests.operations import postgres_tools
from tests.operations.commands import blocks, run
from tests.operations.freeze import RELEASES
from tests.support import in_flight
from tests.support.cluster import Model
from tests.support.launcher import Launcher

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ma-upgrade-") as directory:
        yield Path(directory)


@pytest.fixture
async def empty(postgres_url: str) -> AsyncIterator[str]:
    name = f"test_{uuid4().hex[:12]}"
    yield await databases.create_database(postgres_url, name)
    await databases.drop_database(postgres_url, name)


@pytest.mark.parametrize("revision", sorted(path.name for path in RELEASES.iterdir()))
async def test_a_release_s_sessions_in_flight_go_on_after_the_upgrade(
    revision: str, empty: str, place: Path, model: Model, launcher: Launcher
) -> None:
    release = RELEASES / revision
    tools = await postgres_tools.directory_for(empty)
    psql = [str(tools / "psql"), "--quiet", "--set=ON_ERROR_STOP=1", f"--file={release / 'database.sql'}", empty]
    loaded = await to_thread.run_sync(lambda: subprocess.run(psql, capture_output=True, text=True, timeout=60))
    assert loaded.returncode == 0, loaded.stderr
    shutil.copytree(release / "blobs", place / "blobs")
    shutil.copyfile(release / "master.key", place / "master.key")

    db = Database(empty, pool=1, application_name="test")
    try:
        behind = await unready_reason(db)
        assert (behind is None) == (revision == revisions().head), behind
    finally:
        await db.dispose()
    (upgrade,) = blocks("Upgrade")
    environment = {"MANAGED_AGENTS_DATABASE_URL": empty, "MANAGED_AGENTS_DATA_DIR": str(place), "HOME": str(place)}
    await to_thread.run_sync(run, upgrade, environment, tools)
    await to_thread.run_sync(migrate.check_blocking, empty)
    await in_flight.finish_copy(empty, place, model, launcher, json.loads((release / "sessions.json").read_text()))
