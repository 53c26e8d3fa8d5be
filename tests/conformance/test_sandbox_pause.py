"""A sandbox at rest: first its processes are frozen, later it is stopped; a call finds it as it was."""

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from managed_agents.harness import hands
from managed_agents.resources.sessions import bindings
from managed_agents.sandbox.docker import DockerBackend
from tests.conformance.test_sandbox_life import FILL, FOUND, LOOK, collector, result, rows, session_with, snapshot_of, unowned
from tests.support.stack import Stack, stack

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

LEFT = "(while :; do echo . >> ticks; sleep 0.02; done) & until [ -s ticks ]; do sleep 0.02; done"
GROWS = "before=$(wc -c < ticks); until [ $(wc -c < ticks) -gt $before ]; do sleep 0.02; done; echo grows"


@pytest.fixture(scope="module")
async def contained(anyio_backend: object, postgres_url: str, template: str) -> AsyncIterator[Stack]:
    async with stack(postgres_url, template, sandbox="docker") as running:
        yield running
        await running.check_logs()


async def state(server: Stack, session: object) -> tuple[str, bool, bool]:
    """Of the session's only sandbox: as recorded, whether it runs, whether it is paused."""
    (row,) = await rows(server, session)
    (found,) = [found for found in await server.backend.list() if found.id == row.id]
    return row.state, found.running, found.paused


async def pause(server: Stack) -> None:
    await collector(server, pause_seconds=0.0, idle_seconds=300.0).look()


@pytest.mark.requirement("ENV-037")
async def test_what_a_session_at_rest_left_running_is_frozen_until_its_next_call(contained: Stack) -> None:
    session = await session_with(contained, f"{FILL}; {LEFT}", f"{LOOK}; {GROWS}")
    await result(contained, session)
    assert await state(contained, session) == ("live", True, False)
    await unowned(contained, session)
    for _ in range(2):
        await pause(contained)
        assert await state(contained, session) == ("paused", True, True)
    assert await snapshot_of(contained, session) is None
    assert await result(contained, session) == f"{FOUND}grows\n"
    assert await state(contained, session) == ("live", True, False)


async def test_one_that_is_not_used_for_longer_is_snapshotted_and_stopped(contained: Stack) -> None:
    session = await session_with(contained, FILL, LOOK)
    await result(contained, session)
    await unowned(contained, session)
    await pause(contained)
    await collector(contained).look()
    assert await state(contained, session) == ("stopped", False, False)
    assert await snapshot_of(contained, session) is not None
    assert await result(contained, session) == FOUND


async def test_one_that_was_taken_while_it_was_paused_goes_on(contained: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await session_with(contained, FILL, LOOK)
    await result(contained, session)
    await unowned(contained, session)
    (row,) = await rows(contained, session)
    async with contained.db.transaction() as tx:
        await tx.execute(text("UPDATE sandboxes SET last_used_at = now() - interval '1 hour' WHERE id = :id"), {"id": row.id})
    paused = DockerBackend.pause
    taken: list[str] = []

    async def late(backend: DockerBackend, id: str) -> None:  # noqa: A002
        if id == row.id:
            taken.append(id)
            async with contained.db.transaction() as tx:
                assert not await bindings.take(tx, id, force=False)  # whoever wants it waits
                assert await bindings.take(tx, id, force=True)
        await paused(backend, id)

    with monkeypatch.context() as patched:
        patched.setattr(DockerBackend, "pause", late)
        await collector(contained, pause_seconds=1800.0, idle_seconds=7200.0).look()
    assert taken
    assert await state(contained, session) == ("live", True, False)
    assert await result(contained, session) == FOUND


async def test_one_whose_pauser_died_is_taken_after_a_while(contained: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "STOPPING_SECONDS_MAX", 0.3)
    session = await session_with(contained, FILL, LOOK)
    await result(contained, session)
    await unowned(contained, session)
    async with contained.db.transaction() as tx:
        current = await bindings.current(tx, session.id)
        assert current is not None
        assert await bindings.begin_stop(tx, current)
    await contained.backend.pause(current.sandbox_id)
    assert await state(contained, session) == ("stopping", True, True)
    assert await result(contained, session) == FOUND
    assert await state(contained, session) == ("live", True, False)


async def test_one_that_cannot_be_paused_stays_as_it_is(contained: Stack) -> None:
    session = await session_with(contained, FILL, LOOK)
    await result(contained, session)
    await unowned(contained, session)
    (row,) = await rows(contained, session)
    await contained.backend.pause(row.id)
    await contained.backend.halt(row.id)  # as a container that died at rest
    await pause(contained)
    assert await state(contained, session) == ("live", False, False)
    assert await result(contained, session) == FOUND


@pytest.mark.parametrize("end", ["deleted", "archived"])
async def test_a_paused_one_goes_with_its_session(contained: Stack, end: str) -> None:
    session = await session_with(contained, FILL)
    await result(contained, session)
    await unowned(contained, session)
    await pause(contained)
    (row,) = await rows(contained, session)
    if end == "deleted":
        await contained.client.beta.sessions.delete(session.id)
    else:
        await contained.client.beta.sessions.archive(session.id)
    await pause(contained)
    assert [found for found in await contained.backend.list() if found.id == row.id] == []
    async with contained.db.transaction() as tx:
        states = await tx.execute(text("SELECT state FROM sandboxes WHERE id = :id"), {"id": row.id})
        assert set(states.scalars()) <= {"destroyed"}
