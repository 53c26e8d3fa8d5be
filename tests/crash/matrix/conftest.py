"""One cluster for the whole matrix: its cases are told apart by their sessions."""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from managed_agents.db import databases
from managed_agents.db.engine import Database
from tests.crash.matrix.rig import Rig
from tests.support import cluster as clusters
from tests.support.launcher import Launcher


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(scope="module")
async def rig(anyio_backend: object, postgres_url: str, template: str, launcher: Launcher) -> AsyncIterator[Rig]:
    name = f"test_{uuid4().hex[:12]}"
    url = await databases.create_database(postgres_url, name, template)
    db = Database(url, pool=4, application_name="test")
    async with clusters.scripted_model(lambda _request: "Hello.") as model, clusters.cluster(url, model, launcher) as cluster:
        await cluster.api()
        async with cluster.client() as client:
            yield Rig(cluster, client, db)
    await db.dispose()
    await databases.drop_database(postgres_url, name)
