"""A session's sandbox from turn to turn: stopped at rest, snapshotted, lost, replaced, too old, gone with its session."""

import io
import socket
import tarfile
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from sqlalchemy import text

from managed_agents.blobstore.store import BlobRef
from managed_agents.core import limits
from managed_agents.harness.hands import CRASHED
from managed_agents.reconcilers.sandbox_collector import SandboxCollector
from managed_agents.reconcilers.session_eraser import erase_deleted
from managed_agents.resources.sessions import bindings, snapshots
from managed_agents.sandbox.backend import LimitHit
from managed_agents.sandbox.handle import RunnerSandbox
from managed_agents.scripted_model import tool_use
from tests.support.stack import TOOLSET, Gate, Stack
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

HOST = socket.gethostname()
FILL = "mkdir -p deep; cd deep; echo kept > note; export WHO=me"
LOOK = "cat note; echo $WHO; basename $PWD"
FOUND = "kept\nme\ndeep\n"


def collector(
    server: Stack, *, pause_seconds: float = 3600.0, idle_seconds: float = 0.0, parked_seconds: float = 3600.0
) -> SandboxCollector:
    bounds = {"pause_seconds": pause_seconds, "idle_seconds": idle_seconds, "parked_seconds": parked_seconds}
    return SandboxCollector(server.db, server.backend, server.blobs, host=HOST, **bounds)


async def session_with(server: Stack, *commands: str) -> Any:
    """A session whose turns each run one command."""
    replies: list[Any] = []
    for command in commands:
        replies += [[tool_use("bash", command=command)], "done"]
    return await server.session(replies, tools=TOOLSET)


async def result(server: Stack, session: Any) -> str:
    """Run a turn and return the text of its one result."""
    watch = await server.turn(session)
    (found,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    return found.content[0].text


async def rows(server: Stack, session: Any) -> Sequence[Any]:
    async with server.db.transaction() as tx:
        query = text("SELECT id, generation, state, note FROM sandboxes WHERE session_id = :id ORDER BY generation")
        return (await tx.execute(query, {"id": session.id})).all()


async def snapshot_of(server: Stack, session: Any) -> snapshots.Snapshot | None:
    async with server.db.transaction() as tx:
        return await snapshots.latest(tx, session.id)


async def unowned(server: Stack, session: Any) -> None:
    """Wait until the turn's owner let the session go."""

    async def free() -> bool:
        async with server.db.transaction() as tx:
            return (await tx.execute(text("SELECT owner IS NULL FROM sessions WHERE id = :id"), {"id": session.id})).scalar_one()

    await until(free)


async def park(server: Stack, session: Any, **options: float) -> None:
    """Stop the sandboxes of sessions at rest. One look stops fifty that run, and other tests have left theirs."""
    await unowned(server, session)

    async def parked() -> bool:
        await collector(server, **options).look()
        return all(row.state != "live" for row in await rows(server, session))

    await until(parked, seconds=90)


@pytest.mark.requirement("ENV-037")
async def test_a_sandbox_at_rest_is_snapshotted_and_stopped_and_the_next_call_starts_it(server: Stack) -> None:
    session = await session_with(server, FILL, LOOK)
    await result(server, session)
    await park(server, session)
    (row,) = await rows(server, session)
    assert row.state == "stopped"
    assert await snapshot_of(server, session) is not None
    assert [found.running for found in await server.backend.list() if found.id == row.id] == [False]
    assert await result(server, session) == FOUND
    assert [row.state for row in await rows(server, session)] == ["live"]


async def test_one_that_died_at_rest_is_stopped_and_keeps_none_behind_it_from_being_stopped(server: Stack) -> None:
    session = await session_with(server, FILL, "cat deep/note || cat note")
    await result(server, session)
    await unowned(server, session)
    (row,) = await rows(server, session)
    await server.backend.halt(row.id)
    behind = await session_with(server, "true")
    await result(server, behind)
    await unowned(server, behind)
    many = text(
        "INSERT INTO sandboxes (id, session_id, generation, host, state, last_used_at) SELECT 'sbx_dead_' || n, :id, 100 + n, "
        ":host, 'live', clock_timestamp() - interval '1 year' FROM generate_series(1, 120) AS n"
    )
    gone = await session_with(server)
    async with server.db.transaction() as tx:
        await tx.execute(many, {"id": gone.id, "host": HOST})
    await collector(server).look()
    assert {row.state for row in await rows(server, gone)} == {"destroyed"}
    assert [row.state for row in await rows(server, behind)] == ["stopped"]
    assert [row.state for row in await rows(server, session)] == ["stopped"]
    assert await result(server, session) == "kept\n"
    assert [row.state for row in await rows(server, session)] == ["live"]


async def test_one_that_is_lost_at_rest_is_replaced_and_the_model_told_without_an_error(server: Stack) -> None:
    session = await session_with(server, FILL, "ls")
    await result(server, session)
    await unowned(server, session)
    (row,) = await rows(server, session)
    await (await server.backend.attach(row.id)).destroy()
    await park(server, session)
    assert [row.state for row in await rows(server, session)] == ["destroyed"]
    assert (await result(server, session)).split("\n") == [bindings.FRESH, ""]


async def test_one_that_runs_though_it_is_stopped_is_stopped(server: Stack) -> None:
    session = await session_with(server, FILL)
    await result(server, session)
    await park(server, session)
    (row,) = await rows(server, session)
    await (await server.backend.attach(row.id)).aclose()  # as a collector that came too late
    await collector(server).look()
    assert [found.running for found in await server.backend.list() if found.id == row.id] == [False]
    assert [row.state for row in await rows(server, session)] == ["stopped"]


@pytest.mark.requirement("ENV-053")
async def test_what_was_parked_for_long_is_restored_without_a_word(server: Stack) -> None:
    session = await session_with(server, FILL, LOOK)
    await result(server, session)
    await park(server, session, parked_seconds=0.0)
    (row,) = await rows(server, session)
    assert row.state == "destroyed"
    assert row.id not in {found.id for found in await server.backend.list()}
    assert await result(server, session) == FOUND
    assert [(row.generation, row.state) for row in await rows(server, session)] == [(1, "destroyed"), (2, "live")]


@pytest.mark.requirement("ENV-056")
async def test_a_lost_sandbox_is_an_error_and_the_next_is_restored_and_the_model_told_what_is_older(server: Stack) -> None:
    session = await session_with(server, FILL, "echo later > later", LOOK, f"ls; {LOOK}", "true")
    await result(server, session)
    await park(server, session)
    await result(server, session)
    (row,) = await rows(server, session)
    await (await server.backend.attach(row.id)).destroy()  # by hand
    assert await result(server, session) == CRASHED
    told = await result(server, session)
    note, _, rest = told.partition("\n")
    assert note.startswith("[The sandbox was lost and replaced. ")
    assert " UTC. " in note
    assert rest == f"note\n{FOUND}"  # `later` came after the snapshot
    assert "replaced" not in await result(server, session)  # once
    assert [row.note for row in await rows(server, session)] == [None, None]


async def test_a_lost_sandbox_without_a_snapshot_is_fresh_and_the_model_told(server: Stack) -> None:
    session = await session_with(server, "echo x > x", "true", "ls")
    await result(server, session)
    (row,) = await rows(server, session)
    await (await server.backend.attach(row.id)).destroy()
    assert await result(server, session) == CRASHED
    assert (await result(server, session)).split("\n")[0] == bindings.FRESH


async def test_a_snapshot_that_cannot_be_restored_costs_one_call(server: Stack) -> None:
    session = await session_with(server, FILL, "true", "ls")
    await result(server, session)
    await park(server, session, parked_seconds=0.0)
    found = await snapshot_of(server, session)
    assert found is not None
    await server.blobs.delete(found.blob)
    # The provisioning beside the model request may have met it already, or the call does.
    said = [await result(server, session), await result(server, session)]
    assert [text.split("\n")[0] for text in said if text.startswith("[")] == [bindings.FRESH]


async def pieces(whole: bytes) -> AsyncIterator[bytes]:
    yield whole


def unpackable() -> bytes:
    """An archive that is whole, and cannot be unpacked: a file is where a directory has to be."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in ("workspace/note", "workspace/note/below"):
            archive.addfile(tarfile.TarInfo(name))
    return packed.getvalue()


@pytest.mark.parametrize("trouble", ["unpackable", "disk"])
async def test_a_snapshot_that_fails_whenever_it_is_restored_leaves_the_session_a_fresh_sandbox(
    server: Stack, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await session_with(server, FILL, "ls", "ls")
    await result(server, session)
    await park(server, session, parked_seconds=0.0)
    if trouble == "unpackable":
        blob = await server.blobs.put(pieces(unpackable()), limits.SNAPSHOT_BYTES_MAX)
        other = text("UPDATE sandbox_snapshots SET sha256 = :sha256, size_bytes = :size WHERE session_id = :id")
        async with server.db.transaction() as tx:
            await tx.execute(other, {"sha256": blob.sha256, "size": blob.size, "id": session.id})
    else:

        async def full(*_: object) -> None:
            raise LimitHit("disk")

        monkeypatch.setattr(RunnerSandbox, "restore", full)
    # The provisioning beside the model request tries first, or the call does.
    said = [await result(server, session), await result(server, session)]
    assert [text.split("\n")[0] for text in said if text.startswith("[")] == [bindings.FRESH]
    assert [row.state for row in await rows(server, session)][-1] == "live"
    assert "live" not in [row.state for row in await rows(server, session)][:-1]


@pytest.mark.requirement("ENV-057")
async def test_state_older_than_thirty_days_is_gone_and_the_session_works(server: Stack) -> None:
    session = await session_with(server, FILL, "pwd; ls")
    await result(server, session)
    await park(server, session, parked_seconds=0.0)
    # It was restored often, and its beginning stays the same.
    async with server.db.transaction() as tx:
        for table in ("sandboxes", "sandbox_snapshots"):
            aged = f"UPDATE {table} SET since = since - make_interval(secs => :age) WHERE session_id = :id"
            await tx.execute(text(aged), {"age": limits.SANDBOX_STATE_SECONDS, "id": session.id})
    assert (await result(server, session)).split("\n") == [bindings.FRESH, "/workspace", ""]
    await park(server, session)
    assert [row.state for row in await rows(server, session)] == ["destroyed", "stopped"]
    async with server.db.transaction() as tx:
        since = text("SELECT since > clock_timestamp() - interval '1 day' FROM sandbox_snapshots WHERE session_id = :id")
        assert (await tx.execute(since, {"id": session.id})).scalar_one()


async def test_a_running_sandbox_older_than_thirty_days_is_destroyed_at_rest(server: Stack) -> None:
    session = await session_with(server, FILL, "pwd")
    await result(server, session)
    async with server.db.transaction() as tx:
        aged = "UPDATE sandboxes SET since = since - make_interval(secs => :age) WHERE session_id = :id"
        await tx.execute(text(aged), {"age": limits.SANDBOX_STATE_SECONDS, "id": session.id})
    await unowned(server, session)
    await collector(server, idle_seconds=300.0).look()
    assert [row.state for row in await rows(server, session)] == ["destroyed"]
    assert "/workspace" in await result(server, session)


async def test_only_the_newest_snapshot_is_kept_and_the_blob_collector_spares_it(server: Stack) -> None:
    session = await session_with(server, FILL, "echo more > more", "true")
    taken: list[BlobRef] = []
    for _ in range(2):
        await result(server, session)
        await park(server, session)
        found = await snapshot_of(server, session)
        assert found is not None
        taken.append(found.blob)
    async with server.db.transaction() as tx:
        used = set((await tx.execute(snapshots.referenced([blob.sha256 for blob in taken]))).scalars())
    assert used == {taken[1].sha256}


@pytest.mark.parametrize("end", ["archive", "delete"])
async def test_the_snapshot_goes_with_its_session(server: Stack, end: str) -> None:
    session = await session_with(server, FILL)
    await result(server, session)
    await park(server, session)
    (row,) = await rows(server, session)
    await getattr(server.client.beta.sessions, end)(session.id)
    await collector(server, idle_seconds=300.0).look()
    await erase_deleted(server.db)
    assert await snapshot_of(server, session) is None
    assert row.id not in {found.id for found in await server.backend.list()}


async def test_a_sandbox_that_is_used_while_it_is_snapshotted_is_not_stopped(server: Stack, held: Gate) -> None:
    session = await session_with(server, FILL, f"{held.command}; {LOOK}")
    await result(server, session)
    await unowned(server, session)
    async with server.db.transaction() as tx:
        (seen,) = [found for found in await bindings.unused(tx, host=HOST, idle_seconds=0) if found.session_id == session.id]
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.until("agent.tool_use")
        async with server.db.transaction() as tx:
            # Owned now; and later, when it rests again, used since it was looked at.
            assert not await bindings.begin_stop(tx, seen)
        held.open()
        await watch.idle()
    await unowned(server, session)
    async with server.db.transaction() as tx:
        assert not await bindings.begin_stop(tx, seen)
    assert [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"] == [f"through\n{FOUND}"]


async def test_who_wants_a_sandbox_waits_while_it_is_stopped(server: Stack) -> None:
    session = await session_with(server, FILL, LOOK)
    await result(server, session)
    await unowned(server, session)
    async with server.db.transaction() as tx:
        current = await bindings.current(tx, session.id)
        assert current is not None
        assert await bindings.begin_stop(tx, current)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.until("agent.tool_use")
        await (await server.backend.attach(current.sandbox_id)).stop()
        async with server.db.transaction() as tx:
            await bindings.set_stopped(tx, current.sandbox_id)
        await watch.idle()
    assert [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"] == [FOUND]


async def test_packages_on_a_backend_that_cannot_install_them_are_an_error_of_the_call(server: Stack) -> None:
    config = {"type": "cloud", "packages": {"pip": ["requests"]}}
    environment = await server.client.beta.environments.create(name="with packages", config=config)
    agent = await server.agent([[tool_use("bash", command="true")], "I see."], tools=TOOLSET)
    session = await server.client.beta.sessions.create(agent=agent.id, environment_id=environment.id)
    watch = await server.turn(session)
    (found,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert found.is_error
    assert "needs the `docker` backend" in found.content[0].text
    assert await rows(server, session) == []
