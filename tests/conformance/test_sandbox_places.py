"""Places for running sandboxes: who is turned away waits in a fair queue and is told so; and sandboxes made ahead."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest
from sqlalchemy import text

from managed_agents.processes.sandboxes import sandbox_plan
from managed_agents.reconcilers.sandbox_collector import SandboxCollector
from managed_agents.reconcilers.sandbox_pool import SandboxPool
from managed_agents.resources.sessions import places
from managed_agents.sandbox.backend import SandboxError
from managed_agents.scripted_model import tool_use
from tests.conformance.test_sandbox_life import collector, result, rows, unowned
from tests.support.stack import TOOLSET, Gate, Stack, Variant, gate, stack
from tests.support.waiting import until

pytestmark = pytest.mark.anyio
WAIT_SECONDS = 30.0


@pytest.fixture(scope="module")
async def narrow(server: Stack, postgres_url: str, template: str) -> AsyncIterator[Stack]:
    """A server whose host has one place. After the package's: what began last has to end first."""
    variant = Variant(settings={"sandbox_running_max": 1, "sandbox_wait_seconds": 20.0})
    async with stack(postgres_url, template, variant=variant) as running:
        yield running


@pytest.fixture
def held() -> Iterator[Gate]:
    with gate() as made:
        yield made


@asynccontextmanager
async def relieving(server: Stack) -> AsyncIterator[SandboxCollector]:
    """What a worker does once a second."""
    mine = collector(server)

    async def look() -> None:
        while True:
            await mine.relieve()
            await anyio.sleep(0.1)

    async with anyio.create_task_group() as group:
        group.start_soon(look)
        yield mine
        group.cancel_scope.cancel()


async def session_of(server: Stack, *commands: str) -> Any:
    replies: list[Any] = []
    for command in commands:
        replies += [[tool_use("bash", command=command)], "done"]
    return await server.session(replies, tools=TOOLSET)


async def waiting(server: Stack) -> int:
    async with server.db.transaction() as tx:
        return await places.waiting(tx, host=server.settings.effective_host_name)


def told(event: Any) -> bool:
    return event.type == "session.error" and "Waiting for a place: 1 sandboxes may run" in event.error.message


@pytest.mark.requirement("ENV-081")
async def test_a_session_waits_for_a_place_and_says_so_and_the_one_at_rest_gives_way(narrow: Stack, held: Gate) -> None:
    first = await session_of(narrow, f"echo kept > f; {held.command}", "cat f")
    second = await session_of(narrow, "echo second")
    async with narrow.watching(first) as one, narrow.watching(second) as two, relieving(narrow):
        await narrow.say(first, "go")
        await held.started()
        await narrow.say(second, "go")
        error = await two.until(told)
        assert error.error.retry_status.type == "retrying"
        assert (await narrow.client.beta.sessions.retrieve(second.id)).status == "running"
        assert "agent.tool_result" not in two.types  # one at work is never taken its place
        held.open()
        await one.idle()
        await two.idle()
        outcome = await two.until("agent.tool_result")
        assert outcome.content[0].text == "second\n"
        assert [row.state for row in await rows(narrow, first)] == ["stopped"]
        # Back again: its files are where they were, and the other gives way in turn.
        await unowned(narrow, second)
        await narrow.say(first, "again")
        await one.idle(count=2)
        assert (await one.until("agent.tool_result", count=2)).content[0].text == "kept\n"
    assert [row.state for row in await rows(narrow, second)] == ["stopped"]
    assert await waiting(narrow) == 0


@pytest.mark.requirement("ENV-081")
async def test_one_that_died_at_rest_gives_its_place_to_who_waits(narrow: Stack) -> None:
    first = await session_of(narrow, "echo kept > f", "cat f")
    second = await session_of(narrow, "echo second")
    async with narrow.watching(first) as one, narrow.watching(second) as two, relieving(narrow):
        await narrow.say(first, "go")
        await one.idle()
        await unowned(narrow, first)
        await narrow.backend.halt((await rows(narrow, first))[0].id)  # as the machine's own clean-up of processes would
        await narrow.say(second, "go")
        await two.idle()
        assert (await two.until("agent.tool_result")).content[0].text == "second\n"
        assert [row.state for row in await rows(narrow, first)] == ["stopped"]
        await unowned(narrow, second)
        await narrow.say(first, "again")
        await one.idle(count=2)
        assert (await one.until("agent.tool_result", count=2)).content[0].text == "kept\n"


@pytest.mark.requirement("ENV-081")
async def test_who_waits_too_long_is_told_and_an_interrupt_does_not_wait(
    narrow: Stack, held: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = await session_of(narrow, held.command)
    stopped = await session_of(narrow, "echo never")
    async with narrow.watching(stopped) as watch, narrow.watching(holder) as holding:
        async with relieving(narrow):
            await narrow.say(holder, "go")
            await held.started()
        await narrow.say(stopped, "go")
        await watch.until(told)
        with anyio.fail_after(5):
            await narrow.client.beta.sessions.events.send(stopped.id, events=[{"type": "user.interrupt"}])
            await watch.idle()
        held.open()
        await holding.idle()


async def test_a_call_that_waits_too_long_fails_and_names_the_bound(postgres_url: str, template: str, held: Gate) -> None:
    variant = Variant(settings={"sandbox_running_max": 1, "sandbox_wait_seconds": 0.3})
    async with stack(postgres_url, template, variant=variant) as server:
        holder = await session_of(server, held.command)
        async with server.watching(holder) as holding:
            await server.say(holder, "go")
            await held.started()
            said = await result(server, await session_of(server, "echo never"))
            assert said.startswith(
                "The sandbox could not run this call: all 1 sandboxes that may run on its host at once stayed in use"
            )
            held.open()
            await holding.idle()


async def test_the_queue_is_fair_between_workspaces_and_first_come_within(narrow: Stack) -> None:
    """Only rows: who is let in next is a matter of what they say."""
    host = "a host of rows"
    sessions = {f"{who}{number}": f"sesn_fair_{who}{number}" for who in "ab" for number in range(4)}
    names = text(
        "SELECT string_agg(column_name, ', ') FROM information_schema.columns WHERE table_name = 'sessions' "
        "AND is_generated = 'NEVER' AND column_name NOT IN ('id', 'workspace_id', 'owner', 'deleted_at')"
    )
    made = await narrow.session()
    async with narrow.db.transaction() as tx:
        columns: str = (await tx.execute(names)).scalar_one()
        copy = text(
            f"INSERT INTO sessions (id, workspace_id, deleted_at, {columns}) "
            f"SELECT :id, :workspace, clock_timestamp(), {columns} FROM sessions WHERE id = :of"
        )
        for name, session_id in sessions.items():
            workspace = narrow.caller.workspace_id if name[0] == "a" else narrow.other.workspace_id
            await tx.execute(copy, {"id": session_id, "workspace": workspace, "of": made.id})

    async def ask(name: str) -> bool:
        async with narrow.db.transaction() as tx:
            entered = await places.enter(tx, sessions[name], host=host, running_max=2)
            if entered:
                row = {"id": f"sbx_{sessions[name]}", "session_id": sessions[name], "host": host}
                live = (
                    "INSERT INTO sandboxes (id, session_id, generation, host, state) VALUES (:id, :session_id, 1, :host, 'live')"
                )
                await tx.execute(text(live), row)
            return entered

    async def release(name: str) -> None:
        async with narrow.db.transaction() as tx:
            await tx.execute(text("DELETE FROM sandboxes WHERE session_id = :id"), {"id": sessions[name]})

    assert [await ask(name) for name in ("a0", "a1")] == [True, True]
    assert [await ask(name) for name in ("a2", "a3", "b0", "b1")] == [False] * 4
    await release("a0")
    # `a` came first, and has one already; of `b` the one that came first.
    assert [await ask(name) for name in ("a2", "a3", "b1", "b0")] == [False, False, False, True]
    await release("a1")
    assert [await ask(name) for name in ("b1", "a3", "a2")] == [False, False, True]
    await release("b0")
    assert [await ask(name) for name in ("a3", "b1")] == [False, True]
    async with narrow.db.transaction() as tx:
        # Who stopped asking is passed over, and forgotten.
        await tx.execute(
            text("UPDATE sandbox_waits SET seen_at = seen_at - interval '1 minute' WHERE host = :host"), {"host": host}
        )
        assert await places.waiting(tx, host=host) == 0
        await tx.execute(text("DELETE FROM sandboxes WHERE host = :host"), {"host": host})
        await tx.execute(text("DELETE FROM sessions WHERE id LIKE 'sesn\\_fair\\_%'"))


async def test_a_sandbox_that_cannot_be_made_gives_its_place_back(narrow: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> None:
        raise SandboxError("the engine is not well")

    session = await session_of(narrow, "echo never", "echo fine")
    with monkeypatch.context() as patched:
        patched.setattr(narrow.backend, "provision", fails)
        async with relieving(narrow):
            assert "the engine is not well" in await result(narrow, session)
        assert {row.state for row in await rows(narrow, session)} == {"destroyed"}
    async with relieving(narrow):
        assert await result(narrow, await session_of(narrow, "echo other")) == "other\n"
        assert await result(narrow, session) == "fine\n"


async def test_what_nobody_goes_on_making_is_given_up_at_rest(narrow: Stack) -> None:
    """As after the death of the worker that was making it, in a turn that another brought to its end without calls."""
    session = await narrow.session()
    making = text(
        "INSERT INTO sandboxes (id, session_id, generation, host, state) VALUES ('sbx_half', :id, 1, :host, 'provisioning')"
    )
    async with narrow.db.transaction() as tx:
        await tx.execute(making, {"id": session.id, "host": narrow.settings.effective_host_name})
    await collector(narrow).look()
    assert [row.state for row in await rows(narrow, session)] == ["provisioning"]
    async with narrow.db.transaction() as tx:
        await tx.execute(text("UPDATE sandboxes SET created_at = created_at - interval '1 hour' WHERE id = 'sbx_half'"))
    await collector(narrow).look()
    assert [row.state for row in await rows(narrow, session)] == ["destroyed"]


# Made ahead


def pool_of(server: Stack, count: int, **options: Any) -> SandboxPool:
    plan = sandbox_plan(server.settings)
    return SandboxPool(
        server.db,
        server.backend,
        options.pop("spec", plan.spec),
        options.pop("pools", {server.environment_id: count} if count else {}),
        host=server.settings.effective_host_name,
        image=server.settings.sandbox_image,
        **options,
    )


async def fill(server: Stack, pool: SandboxPool) -> None:
    """What a worker does once a second."""
    await pool.prepare(server.environment_id)
    await pool.look()


async def pooled(server: Stack) -> list[places.Pooled]:
    async with server.db.transaction() as tx:
        return await places.pooled(tx, host=server.settings.effective_host_name)


@pytest.mark.requirement("ENV-082")
async def test_a_session_adopts_a_sandbox_made_ahead_and_nobody_gets_it_after(server: Stack) -> None:
    pool = pool_of(server, 2)
    await fill(server, pool)
    ready = [each.id for each in await pooled(server)]
    assert [each.ready for each in await pooled(server)] == [True, True]
    await pool.look()
    await collector(server).look()  # which destroys what nobody knows
    assert [each.id for each in await pooled(server)] == ready
    first = await session_of(server, "pwd; ls -A; echo mine > mine")
    second = await session_of(server, "ls -A")
    assert await result(server, first) == "/workspace\n"
    assert await result(server, second) == "(no output)"
    taken = {(await rows(server, each))[0].id for each in (first, second)}
    assert taken == set(ready)
    assert await pooled(server) == []
    await pool.look()
    assert not {each.id for each in await pooled(server)} & taken
    await pool.drain()  # nothing: this server's worker lives
    assert len(await pooled(server)) == 2
    await pool_of(server, 0).look()
    assert await pooled(server) == []
    assert not {each.id for each in await server.backend.list()} & ({each.id for each in await pooled(server)} - taken)


async def test_a_dead_one_from_the_pool_costs_the_model_nothing(server: Stack) -> None:
    await fill(server, pool_of(server, 1))
    [ahead] = await pooled(server)
    await (await server.backend.attach(ahead.id)).destroy()
    session = await session_of(server, "echo fine")
    assert await result(server, session) == "fine\n"
    assert [row.id for row in await rows(server, session)] == [ahead.id]


async def test_one_that_died_in_the_pool_is_replaced(server: Stack) -> None:
    pool = pool_of(server, 1)
    await fill(server, pool)
    [dead] = await pooled(server)
    await server.backend.halt(dead.id)  # as an engine does that was killed and comes back
    await pool_of(server, 1).look()
    assert await pooled(server) == []
    await fill(server, pool)
    [fresh] = await pooled(server)
    assert fresh.ready
    assert fresh.id != dead.id
    await pool.look()
    assert [each.id for each in await pooled(server)] == [fresh.id]
    await pool_of(server, 0).look()


async def test_what_is_not_like_the_settings_any_more_is_given_up_and_its_sandbox_destroyed(server: Stack) -> None:
    await fill(server, pool_of(server, 1))
    [old] = await pooled(server)
    plan = sandbox_plan(server.settings)

    def larger(*names: Any) -> Any:
        spec = plan.spec(*names)
        return replace(spec, limits=replace(spec.limits, pids=99))

    pool = pool_of(server, 1, spec=larger)
    await pool.look()
    assert [each.id for each in await pooled(server)] == [old.id]  # what its image is has still to be found out
    await fill(server, pool)
    [new] = await pooled(server)
    assert new.id != old.id
    assert old.id not in {each.id for each in await server.backend.list()}
    session = await session_of(server, "echo fine")
    await result(server, session)
    assert (await rows(server, session))[0].id not in (old.id, new.id)  # neither is like what it needs
    await pool_of(server, 0).look()


async def test_a_pool_takes_no_place_that_a_session_needs(narrow: Stack, held: Gate) -> None:
    async def free() -> bool:
        await collector(narrow).look()
        return not any(each.running for each in await narrow.backend.list())

    await until(free, seconds=WAIT_SECONDS)
    pool = pool_of(narrow, 3, running_max=1)
    await fill(narrow, pool)
    assert len(await pooled(narrow)) == 1
    # Of another environment's likeness: it cannot be adopted, so it has to go.
    async with narrow.db.transaction() as tx:
        await tx.execute(text("UPDATE pooled_sandboxes SET fingerprint = 'other'"))
    session = await session_of(narrow, "echo fine")
    async with narrow.watching(session) as watch:
        await narrow.say(session, "go")

        async def asked() -> bool:
            return await waiting(narrow) == 1

        await until(asked, seconds=WAIT_SECONDS)
        await pool.look()
        await watch.idle()
        assert (await watch.until("agent.tool_result")).content[0].text == "fine\n"
    assert await pooled(narrow) == []


async def test_an_environment_that_fails_is_tried_later_and_keeps_no_other_from_its_sandboxes(
    server: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = {"type": "cloud", "packages": {"pip": ["requests"]}}
    broken = await server.client.beta.environments.create(name="before it in every list", config=config)
    tried: list[str] = []
    prepare, provision = server.backend.prepare, server.backend.provision

    async def preparing(image: str, packages: Any) -> str:
        tried.extend(packages)
        return await prepare(image, packages)

    async def provisioning(spec: Any) -> Any:
        if spec.env.get("OF") == "broken":
            tried.append("provision")
            raise SandboxError("not this one")
        return await provision(spec)

    plan = sandbox_plan(server.settings)

    def spec(*names: Any) -> Any:
        return replace(plan.spec(*names), env={"OF": "broken"} if names[3] == broken.id else {})

    monkeypatch.setattr(server.backend, "prepare", preparing)
    monkeypatch.setattr(server.backend, "provision", provisioning)
    pool = pool_of(server, 1, spec=spec, pools={broken.id: 1, server.environment_id: 1})
    for _ in range(3):
        await pool.prepare(broken.id)  # no packages on this backend
    assert tried == ["pip"]
    await server.client.beta.environments.update(broken.id, config={"type": "cloud", "packages": {"pip": []}})
    for _ in range(3):
        await pool.prepare(broken.id)  # others than those that failed
        await fill(server, pool)
    assert tried == ["pip", "provision"]
    assert [each.environment_id for each in await pooled(server)] == [server.environment_id]
    await pool_of(server, 0).look()
