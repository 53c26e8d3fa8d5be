"""Threads: list, retrieve, archive; their events as a list and as a stream."""

from typing import Any

import anthropic
import anyio
import orjson
import pytest
from sqlalchemy import text

from managed_agents.core import ids
from tests.support.stack import Stack
from tests.support.watch import WAIT_SECONDS

pytestmark = pytest.mark.anyio

# Nothing starts child threads yet, so the tests put them into the table.
_CHILD = text(
    "INSERT INTO session_threads (id, session_id, workspace_id, parent_thread_id, agent, created_at, updated_at, status) "
    "SELECT :id, session_id, workspace_id, id, agent, clock_timestamp(), clock_timestamp(), :status "
    "FROM session_threads WHERE session_id = :session_id AND parent_thread_id IS NULL"
)


async def child(server: Stack, session: Any, status: str = "idle") -> str:
    thread_id = ids.new_id(ids.THREAD)
    async with server.db.transaction() as tx:
        await tx.execute(_CHILD, {"id": thread_id, "session_id": session.id, "status": status})
    return thread_id


async def primary(server: Stack, session: Any) -> Any:
    return await anext(aiter(await server.client.beta.sessions.threads.list(session.id)))


async def forget(server: Stack, session: Any, thread_id: str) -> None:
    """Remove a child that never ran, which no log tells of: what holds for all logs is checked at the end."""
    async with server.db.transaction() as tx:
        await tx.execute(text("DELETE FROM session_threads WHERE id = :id"), {"id": thread_id})


@pytest.mark.requirement("SES-072")
async def test_a_thread_before_and_after_its_first_turn(server: Stack) -> None:
    session = await server.session(["ok"])
    fresh = await primary(server, session)
    assert (fresh.status, fresh.stats, fresh.usage, fresh.parent_thread_id) == ("idle", None, None, None)
    assert (fresh.session_id, fresh.archived_at, fresh.workflow_run_id) == (session.id, None, None)
    watch = await server.turn(session)
    told = next(e for e in watch.logged if e.type == "session.thread_status_running")
    assert told.session_thread_id == fresh.id
    after = await server.client.beta.sessions.threads.retrieve(fresh.id, session_id=session.id)
    assert after.usage.input_tokens > 0
    assert after.usage.list_cost is not None
    assert after.stats.active_seconds > 0
    assert after.stats.startup_seconds >= 0
    assert after.agent.to_dict() == {k: v for k, v in session.agent.to_dict().items() if k != "multiagent"}


@pytest.mark.requirement("SES-074")
async def test_the_primary_thread_has_the_events_of_its_session(server: Stack) -> None:
    session = await server.session(["one", "two"])
    thread = await primary(server, session)
    events: list[Any] = []
    opened, done = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:

        async def follow() -> None:
            stream = await server.client.beta.sessions.threads.events.stream(thread.id, session_id=session.id)
            async with stream:
                opened.set()
                async for event in stream:
                    events.append(event)
                    if event.type == "session.status_idle":
                        done.set()

        group.start_soon(follow)
        with anyio.fail_after(WAIT_SECONDS):
            await opened.wait()
            await server.turn(session)
            await done.wait()
        group.cancel_scope.cancel()
    list_ = server.client.beta.sessions.threads.events.list
    listed = [e.to_dict() async for e in list_(thread.id, session_id=session.id)]
    assert listed == [e.to_dict() for e in await server.history(session)]
    assert [e.to_dict() for e in events if e.processed_at is not None] == listed
    assert [e.to_dict() async for e in list_(thread.id, session_id=session.id, limit=3)] == listed


@pytest.mark.requirement("SES-075")
async def test_parameters_of_thread_events(server: Stack) -> None:
    session = await server.session(["ok"])
    await server.turn(session)
    thread = await primary(server, session)
    path = f"/v1/sessions/{session.id}/threads/{thread.id}"
    for bad in ("limit=0", "limit=1001", "order=desc", "types[]=user.message", "page=x", "created_at[gt]=2026-01-01T00:00:00Z"):
        assert (await server.refused("GET", f"{path}/events?{bad}"))[:4] in (bad[:4], "inva")
    cursor = (await server.raw("GET", f"/v1/sessions/{session.id}/events?limit=1")).json()["next_page"]
    assert await server.refused("GET", f"{path}/events?page={cursor}") == "invalid page cursor"
    await server.refused("GET", f"{path}/stream?event_deltas[]=agent.tool_use")
    # There is no such path: the thread's stream is not below its events.
    assert await server.refused("GET", f"{path}/events/stream", status=404) == "not found"


@pytest.mark.requirement("SES-073")
async def test_listing_threads(server: Stack) -> None:
    session = await server.session()
    first = await primary(server, session)
    others = [await child(server, session, status) for status in ("idle", "running", "terminated")]
    threads = server.client.beta.sessions.threads
    assert [t.id async for t in threads.list(session.id)] == [first.id, *others]
    assert [t.id async for t in threads.list(session.id, limit=1)] == [first.id, *others]
    assert [t.id async for t in threads.list(session.id, statuses=["running", "terminated"])] == others[1:]
    assert [t.id async for t in threads.list(session.id, statuses=["rescheduling"])] == []
    path = f"/v1/sessions/{session.id}/threads"
    for bad in ("limit=0", "limit=1001", "statuses[]=busy", "page=x", "order=asc"):
        await server.refused("GET", f"{path}?{bad}")
    assert set((await server.raw("GET", path)).json()) == {"data", "next_page"}
    for thread_id in others:
        await forget(server, session, thread_id)


@pytest.mark.requirement("SES-076", "SES-077")
async def test_a_child_is_archived_once_it_is_idle(server: Stack) -> None:
    session = await server.session()
    idle, running = await child(server, session), await child(server, session, "running")
    archive = server.client.beta.sessions.threads.archive
    with pytest.raises(anthropic.BadRequestError, match='cannot be archived while its status is "running"'):
        await archive(running, session_id=session.id)
    archived = await archive(idle, session_id=session.id)
    assert archived.status == "terminated"
    assert archived.archived_at is not None
    again = await archive(idle, session_id=session.id)
    assert again.archived_at == archived.archived_at
    (event,) = [e async for e in server.client.beta.sessions.threads.events.list(idle, session_id=session.id)]
    assert (event.type, event.session_thread_id) == ("session.thread_status_terminated", idle)
    # What has ended is streamed to its end at once.
    answer = await server.raw("GET", f"/v1/sessions/{session.id}/threads/{idle}/stream")
    assert (answer.status_code, answer.content) == (200, b"")
    assert (await server.client.beta.sessions.retrieve(session.id)).status == "idle"
    await forget(server, session, running)
    await server.client.beta.sessions.delete(session.id)


@pytest.mark.requirement("SES-076")
async def test_the_primary_thread_lives_as_long_as_its_session(server: Stack) -> None:
    session = await server.session()
    thread = await primary(server, session)
    path = f"/v1/sessions/{session.id}/threads/{thread.id}/archive"
    assert "primary thread" in await server.refused("POST", path)
    assert (await primary(server, session)).archived_at is None


@pytest.mark.requirement("SES-077")
async def test_the_end_of_the_session_ends_the_streams_of_its_threads(server: Stack) -> None:
    session = await server.session()
    thread_id = await child(server, session)
    path = f"/v1/sessions/{session.id}/threads/{thread_id}/stream"
    async with server.http.stream("GET", path, headers=server.headers()) as stream:
        await forget(server, session, thread_id)
        await server.client.beta.sessions.archive(session.id)
        with anyio.fail_after(WAIT_SECONDS):
            received = b"".join([chunk async for chunk in stream.aiter_bytes()])
    assert b"session.status_terminated" not in received  # it is not told on the thread itself


@pytest.mark.requirement("SES-078")
async def test_threads_that_are_not_there(server: Stack) -> None:
    session, other = await server.session(), await server.session()
    thread = await primary(server, session)
    for session_id, thread_id in ((session.id, "sthr_01x"), (session.id, "x"), (other.id, thread.id)):
        path = f"/v1/sessions/{session_id}/threads/{thread_id}"
        for method, below in (("GET", ""), ("POST", "/archive"), ("GET", "/events"), ("GET", "/stream")):
            answer = await server.raw(method, path + below)
            assert answer.status_code == 404
            error = orjson.loads(answer.content)["error"]
            assert error["message"] == f"Thread {thread_id} not found"
            assert error["details"] == {"error_code": "thread_not_found"}
