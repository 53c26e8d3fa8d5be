"""Containers for what is hostile: one that attacks, one beside it that must not notice, both for all tests of this folder.

A missing engine fails these tests.
"""

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from managed_agents.sandbox.backend import Outcome, Sandbox
from tests.integration.sandbox.contract import MIB, Bench, new_call, text
from tests.support.sandboxes import nothing_known

LIMITS = {"memory_bytes": 128 * MIB, "disk_bytes": 64 * MIB, "pids": 64, "open_files": 256, "output_bytes": 2 * MIB}

Run = Callable[..., Awaitable[Outcome]]
Say = Callable[[str], Awaitable[str]]


@pytest.fixture(scope="package")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package")
async def bench(anyio_backend: str) -> AsyncIterator[Bench]:
    directory = Path(tempfile.mkdtemp(prefix="mh", dir="/tmp"))
    directory.chmod(0o755)
    bench = Bench("docker", directory, directory.name)
    yield bench
    await bench.backend().collect_orphans(nothing_known)
    left = bench.traces()
    for backend in bench.backends:
        await backend.aclose()
    shutil.rmtree(directory)
    assert not any(left.values()), left


@pytest.fixture(scope="package")
async def attacker(bench: Bench) -> AsyncIterator[Sandbox]:
    spec = replace(bench.spec("sbx_attacker", **LIMITS), network="gateway")
    sandbox = await bench.backend().provision(spec)
    yield sandbox
    await sandbox.aclose()


@pytest.fixture(scope="package")
async def neighbour(bench: Bench) -> AsyncIterator[Sandbox]:
    """Another session's sandbox, with a file, an outcome that is not acknowledged, and a process."""
    sandbox = await bench.backend().provision(replace(bench.spec("sbx_neighbour", **LIMITS), network="gateway"))
    call = new_call("bash", command="echo neighbours-file > secret; sleep 1000 & echo neighbours-outcome")
    await sandbox.execute(replace(call, tool_use_id="kept"))
    yield sandbox
    await sandbox.aclose()


@pytest.fixture
def run(attacker: Sandbox) -> Run:
    """Run a tool in the attacker's sandbox."""

    async def execute(name: str, **arguments: object) -> Outcome:
        call = new_call(name, **arguments)
        outcome = await attacker.execute(call)
        await attacker.ack(call.tool_use_id)
        return outcome

    return execute


@pytest.fixture
def say(run: Run) -> Say:
    """Run a command in the attacker's sandbox and return what it says, errors too."""

    async def execute(command: str) -> str:
        return text(await run("bash", command=command))

    return execute


@pytest.fixture(autouse=True)
async def unharmed(request: pytest.FixtureRequest, anyio_backend: str, run: Run, neighbour: Sandbox) -> AsyncIterator[None]:
    """Whatever a test did: the attacker's session goes on with every kind of tool, and the neighbour noticed nothing."""
    yield
    assert text(await run("bash", command="echo alive")).endswith("alive\n")
    assert not (await run("glob", pattern="none")).is_error
    assert text(await neighbour.collect("kept", 1)) == "neighbours-outcome\n"
    call = new_call("bash", command="cat secret; pgrep -c sleep")
    assert text(await neighbour.execute(call)) == "neighbours-file\n1\n"
    await neighbour.ack(call.tool_use_id)
