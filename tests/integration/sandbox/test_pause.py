"""Sandboxes whose processes are frozen: nothing in them moves, and whoever wants them finds them as they were."""

from collections.abc import AsyncIterator

import anyio
import pytest

from managed_agents.sandbox.backend import Sandbox, SandboxBackend, SandboxError, SandboxGone
from tests.integration.sandbox.contract import SIZED, Bench, new_call, only, text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

COUNTING = "export WHO=me; (while :; do echo . >> ticks; sleep 0.02; done) & until [ -s ticks ]; do sleep 0.02; done; echo begun"


@pytest.fixture
async def sandbox(bench: Bench) -> AsyncIterator[Sandbox]:
    made = await bench.backend().provision(bench.spec())
    yield made
    await made.destroy()


async def states(backend: SandboxBackend, sandbox: Sandbox) -> list[tuple[bool, bool]]:
    """Whether it runs, and is paused."""
    return [(found.running, found.paused) for found in await backend.list() if found.id == sandbox.id]


def ticks(bench: Bench, sandbox: Sandbox) -> bytes:
    """What the loop of `COUNTING` has written, as the host sees it, so that nothing in the sandbox has to answer."""
    (found,) = (bench.directory / "data" / "sandboxes").glob(f"{sandbox.id}.*/disk/workspace/ticks")
    return found.read_bytes()


@only(*SIZED)
async def test_what_is_paused_stands_still_and_an_attachment_lets_it_go_on(bench: Bench, sandbox: Sandbox) -> None:
    backend = bench.backend()
    assert text(await sandbox.execute(new_call("bash", command=COUNTING))).endswith("begun\n")
    for _ in range(2):
        await backend.pause(sandbox.id)
    before = ticks(bench, sandbox)
    for _ in range(20):  # which takes the loop some rounds
        assert await states(backend, sandbox) == [(True, True)]
    assert ticks(bench, sandbox) == before
    second = await backend.attach(sandbox.id)
    with anyio.fail_after(30):
        assert text(await second.execute(new_call("bash", command="echo $WHO"))) == "me\n"
        while ticks(bench, sandbox) == before:
            assert await states(backend, sandbox) == [(True, False)]
    await backend.resume(sandbox.id)  # it goes on already
    await second.aclose()


@only("docker", "docker-volume")
async def test_what_is_paused_can_be_resumed_halted_and_destroyed(bench: Bench, sandbox: Sandbox) -> None:
    backend = bench.backend()
    await backend.pause(sandbox.id)
    await backend.resume(sandbox.id)
    assert text(await sandbox.execute(new_call("bash", command="echo kept > f; cat f"))) == "kept\n"
    await backend.pause(sandbox.id)
    assert await backend.halt(sandbox.id)
    assert await states(backend, sandbox) == [(False, False)]
    with pytest.raises(SandboxGone):
        await backend.pause(sandbox.id)
    await backend.resume(sandbox.id)
    assert await states(backend, sandbox) == [(False, False)]  # never started
    second = await backend.attach(sandbox.id)
    assert text(await second.execute(new_call("bash", command="cat f"))) == "kept\n"
    await backend.pause(sandbox.id)
    await second.destroy()
    assert await states(backend, sandbox) == []


@only("docker")
async def test_many_may_resume_one_at_once(bench: Bench, sandbox: Sandbox) -> None:
    backend = bench.backend()
    await backend.pause(sandbox.id)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(backend.resume, sandbox.id)
    assert await states(backend, sandbox) == [(True, False)]


@only("local", "local-mapped")
async def test_a_backend_that_cannot_pause_says_so(bench: Bench, sandbox: Sandbox) -> None:
    backend = bench.backend()
    assert "pause" not in backend.capabilities
    with pytest.raises(SandboxError, match="cannot be paused"):
        await backend.pause(sandbox.id)
    await backend.resume(sandbox.id)
    assert await states(backend, sandbox) == [(True, False)]
