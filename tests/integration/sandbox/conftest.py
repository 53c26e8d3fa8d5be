"""One contract, every backend: real engine, real processes. A missing engine fails these tests."""

import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from managed_agents.sandbox.backend import Outcome, Sandbox
from tests.integration.sandbox.contract import KINDS, Bench, new_call
from tests.support.sandboxes import nothing_known


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=KINDS)
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    directory = Path(tempfile.mkdtemp(prefix="ma", dir="/tmp"))
    directory.chmod(0o755)
    bench = Bench(request.param, directory, directory.name)
    yield bench
    await bench.backend().collect_orphans(nothing_known)
    left = bench.traces()
    for backend in bench.backends:
        await backend.aclose()
    shutil.rmtree(directory)
    assert not any(left.values()), left


@pytest.fixture(scope="module")
async def shared(bench: Bench) -> AsyncIterator[Sandbox]:
    """A sandbox that the tests of a module share."""
    sandbox = await bench.backend().provision(bench.spec("sbx_shared"))
    yield sandbox
    await sandbox.aclose()


Run = Callable[..., Any]


@pytest.fixture
def run(shared: Sandbox) -> Run:
    """Execute a call in the shared sandbox and acknowledge it."""

    async def execute(name: str, **arguments: Any) -> Outcome:
        call = new_call(name, **arguments)
        outcome = await shared.execute(call)
        await shared.ack(call.tool_use_id)
        assert outcome.content, "content is never an empty list"
        json.dumps(outcome.content)
        return outcome

    return execute
