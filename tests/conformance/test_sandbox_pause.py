"""A sandbox at rest: first its processes are frozen, later it is stopped; a call finds it as it was."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import pytest
from sqlalchemy import text

from managed_agents.reconcilers import sandbox_collector
from managed_agents.sandbox import client
from managed_agents.sandbox.backend import Sandbox
from managed_agents.sandbox.docker import DockerBackend
from tests.conformance.test_sandbox_life import FILL, FOUND, LOOK, collector, result, rows, session_with, snapshot_of, unowned
from tests.support.stack import Stack, stack
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

_WAITS = text(
    "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
    "AND query LIKE 'UPDATE sandboxes%')"
)
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
    await collector(server, pause_seconds=0.0).pause_resting()


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


async def test_whoever_wants_one_that_is_being_paused_waits_and_has_it(contained: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await session_with(contained, FILL, LOOK)
    await result(contained, session)
    await unowned(contained, session)
    (row,) = await rows(contained, session)
    paused = DockerBackend.pause

    async def waited_for() -> bool:
        async with contained.db.autocommit() as tx:
            return (await tx.execute(_WAITS)).scalar_one()

    async def slowly(backend: DockerBackend, id: str) -> None:  # noqa: A002
        await paused(backend, id)
        if id == row.id:
            await contained.say(session, "go")
            await until(waited_for)

    monkeypatch.setattr(DockerBackend, "pause", slowly)
    async with contained.watching(session) as watch:
        await pause(contained)
        await watch.idle()
    assert [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"] == [FOUND]
    assert await state(contained, session) == ("live", True, False)


async def test_one_whose_pauser_died_is_there(contained: Stack) -> None:
    session = await session_with(contained, FILL, LOOK)
    await result(contained, session)
    await unowned(contained, session)
    (row,) = await rows(contained, session)
    await contained.backend.pause(row.id)  # and no more
    assert await state(contained, session) == ("live", True, True)
    assert await result(contained, session) == FOUND
    assert await state(contained, session) == ("live", True, False)


async def test_a_pause_that_takes_too_long_is_undone(contained: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_collector, "PAUSE_SECONDS_MAX", 0.5)
    session = await session_with(contained, FILL, LOOK)
    await result(contained, session)
    await unowned(contained, session)
    (row,) = await rows(contained, session)
    paused = DockerBackend.pause

    async def slowly(backend: DockerBackend, id: str) -> None:  # noqa: A002
        await paused(backend, id)
        if id == row.id:
            await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(DockerBackend, "pause", slowly)
        await pause(contained)
    assert await state(contained, session) == ("live", True, False)
    assert await result(contained, session) == FOUND


async def test_a_pause_that_comes_in_mid_call_holds_it_up_and_does_not_end_it(
    contained: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 6.0)  # one more than a runner needs to say that it works
    session = await session_with(contained, "touch started; until [ -e go ]; do sleep 0.02; done; echo through")
    async with contained.watching(session) as watch:
        await contained.say(session, "go")
        await watch.until("agent.tool_use")
        (row,) = await until(lambda: rows_live(contained, session))
        sandbox = await contained.backend.attach(row.id)
        await until(lambda: started(sandbox))
        await contained.backend.pause(row.id)  # by an engine that was slow, when nobody waited for it any more
        await sandbox.put("/workspace/go", b"", "agent")
        await watch.idle()
        await sandbox.aclose()
    assert [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"] == ["through\n"]


async def rows_live(server: Stack, session: object) -> Sequence[Any]:
    return [row for row in await rows(server, session) if row.state == "live"]


async def started(sandbox: Sandbox) -> bool:
    return any(entry.path == "started" for entry in await sandbox.listing("/workspace"))


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
    await collector(contained, idle_seconds=300.0).look()
    assert [found for found in await contained.backend.list() if found.id == row.id] == []
    async with contained.db.transaction() as tx:
        states = await tx.execute(text("SELECT state FROM sandboxes WHERE id = :id"), {"id": row.id})
        assert set(states.scalars()) <= {"destroyed"}
