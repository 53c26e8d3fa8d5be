"""What the operators' tests share: a launcher of processes, and a model."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support import cluster as clusters
from tests.support import in_flight
from tests.support.cluster import Model
from tests.support.launcher import Launcher
from tests.support.launcher import launcher as launching


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    with launching() as made:
        yield made


@pytest.fixture
async def model() -> AsyncIterator[Model]:
    # A fixture, so that a failing test does not cancel its server.
    async with clusters.scripted_model(in_flight.interrupted) as made:
        yield made
