"""Updating, archiving and deleting sessions."""

from typing import Any

import anthropic
import anyio
import pytest
from sqlalchemy import text

from managed_agents.scripted_model import stall, tool_use
from tests.support.stack import BETA, TOOLSET, Gate, Stack, message
from tests.support.watch import WAIT_SECONDS

pytestmark = pytest.mark.anyio


@pytest.mark.requirement("CNV-051", "SES-045", "SES-046")
async def test_update_tells_only_what_changed(server: Stack) -> None:
    session = await server.session(title="old", metadata={"a": "1", "b": "2"})
    update = server.client.beta.sessions.update
    async with server.watching(session) as watch:
        titled = await update(session.id, title="new")
        assert (titled.title, titled.metadata) == ("new", {"a": "1", "b": "2"})
        merged = await update(session.id, metadata={"a": None, "c": "3"})
        assert (merged.title, merged.metadata) == ("new", {"b": "2", "c": "3"})
        both = await update(session.id, title=None, metadata={"b": None, "c": None})
        assert (both.title, both.metadata) == (None, {})
        await watch.until("session.updated", count=3)
    bodies = [event.to_dict() for event in watch.logged]
    own = [{key: value for key, value in body.items() if key not in ("id", "type", "processed_at")} for body in bodies]
    assert own == [{"title": "new"}, {"metadata": {"b": "2", "c": "3"}}, {"title": None}]
    assert [event.type for event in await server.history(session)] == ["session.updated"] * 3
    assert both.updated_at >= session.updated_at
    assert both.status == "idle"


@pytest.mark.requirement("SES-047")
async def test_an_update_that_changes_nothing_appends_nothing(server: Stack) -> None:
    session = await server.session(title="same", metadata={"a": "1"})
    update = server.client.beta.sessions.update
    await update(session.id)
    await update(session.id, title="same", metadata={"a": "1", "unknown": None})
    await update(session.id, metadata={})
    assert await server.history(session) == []
    retrieved = await server.client.beta.sessions.retrieve(session.id)
    assert retrieved.updated_at == session.updated_at


@pytest.mark.requirement("SES-045")
async def test_update_while_running(server: Stack, held: Gate) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "done"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        updated = await server.client.beta.sessions.update(session.id, title="meanwhile")
        assert updated.status == "running"
        held.open()
        await watch.idle()
    assert watch.types.count("session.updated") == 1
    assert [e.to_dict() for e in await server.history(session)] == [e.to_dict() for e in watch.logged]


@pytest.mark.requirement("CNV-050", "SES-048", "SES-049")
@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"vault_ids": []}, "vault_ids"),
        ({"vault_ids": None}, "vault_ids"),
        ({"vault_ids": ["vlt_01x"]}, "vault_ids"),
        ({"budget": {"type": "limit"}}, "budget.max_list_cost"),
        ({"budget": {"type": "limit", "max_list_cost": {"amount": "100", "currency": "USD"}}}, "budget: can only be set"),
        ({"budget": {"type": "limit", "max_list_cost": {"amount": "0", "currency": "USD"}}}, "budget.max_list_cost.amount"),
        ({"budget": {"type": "limit", "max_list_cost": {"amount": "1.5", "currency": "USD"}}}, "budget.max_list_cost.amount"),
        ({"budget": {"type": "limit", "max_list_cost": {"amount": "1", "currency": "EUR"}}}, "budget.max_list_cost.currency"),
        ({"agent": None}, "agent"),
        ({"agent": {"tools": None}}, "agent.tools"),
        ({"agent": {"model": "claude-opus-5"}}, "agent.model"),
        ({"agent": {"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]}}, "agent.tools.0"),
        ({"agent": {"mcp_servers": [{"type": "url", "name": "x", "url": "https://example.com"}]}}, "agent.mcp_servers"),
        ({"model": "x"}, "model"),
        ({"environment_id": "env_01x"}, "environment_id"),
        ({"title": 1}, "title"),
        ({"title": "x" * 501}, "title"),
        ({"title": "a\x00b"}, "title"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"k" * 65: "v"}}, "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
    ],
)
async def test_refused_updates_change_nothing(server: Stack, body: dict[str, Any], named: str) -> None:
    session = await server.session(title="kept", metadata={"a": "1"})
    said = await server.refused("POST", f"/v1/sessions/{session.id}", json={"title": "never", **body})
    assert said.startswith(named), said
    retrieved = await server.client.beta.sessions.retrieve(session.id)
    assert (retrieved.title, retrieved.metadata, retrieved.updated_at) == ("kept", {"a": "1"}, session.updated_at)
    assert await server.history(session) == []


@pytest.mark.requirement("SES-069")
async def test_tools_are_replaced_for_this_session_alone(server: Stack) -> None:
    session = await server.session([[tool_use("bash", command="true")], "sorry", "ok"], tools=TOOLSET)
    only_read = [{**TOOLSET[0], "default_config": {"enabled": False}, "configs": [{"name": "read", "enabled": True}]}]
    async with server.watching(session) as watch:
        updated = await server.client.beta.sessions.update(session.id, agent={"tools": only_read, "mcp_servers": []})
        told = await watch.until("session.updated")
        await server.say(session, "go")
        await watch.idle()
    assert [config.name for config in updated.agent.tools[0].configs] == ["read"]
    assert told.agent.to_dict() == updated.agent.to_dict()
    assert set(told.to_dict()) == {"type", "id", "processed_at", "agent"}
    (use,) = [event for event in watch.logged if event.type == "agent.tool_use"]
    assert use.evaluated_permission == "deny"
    assert set(server.requests(session)[0].tools) == {"read"}
    assert (await server.client.beta.agents.retrieve(session.agent.id)).tools[0].configs == []
    # The same again changes nothing; an empty list clears.
    count = len(await server.history(session))
    await server.client.beta.sessions.update(session.id, agent={"tools": only_read})
    assert len(await server.history(session)) == count
    assert (await server.client.beta.sessions.update(session.id, agent={"tools": []})).agent.tools == []


@pytest.mark.requirement("SES-070")
async def test_tools_cannot_be_replaced_while_it_runs(server: Stack, held: Gate) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "done"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        said = await server.refused("POST", f"/v1/sessions/{session.id}", json={"title": "no", "agent": {"tools": []}})
        held.open()
        await watch.idle()
    assert said.startswith("agent: ")
    assert (await server.client.beta.sessions.retrieve(session.id)).title is None
    assert "session.updated" not in watch.types


@pytest.mark.requirement("SES-071")
async def test_a_budget_that_never_was_can_be_removed(server: Stack) -> None:
    session = await server.session()
    assert (await server.client.beta.sessions.update(session.id, budget=None)).budget is None
    body = {"budget": {"type": "limit", "max_list_cost": {"amount": "100", "currency": "USD"}}}
    answer = await server.raw("POST", f"/v1/sessions/{session.id}", json=body)
    assert answer.json()["error"]["details"] == {"error_code": "budget_create_only"}
    assert await server.history(session) == []


@pytest.mark.requirement("EVT-058", "EVT-064", "SES-036", "SES-050", "SES-051")
async def test_archive(server: Stack) -> None:
    session = await server.session(["ok"])
    await server.turn(session)
    async with server.watching(session) as watch:
        archived = await server.client.beta.sessions.archive(session.id)
        await watch.end_reached()
    assert archived.status == "terminated"
    assert archived.archived_at is not None
    assert watch.types == ["session.thread_status_terminated", "session.status_terminated"]
    again = await server.client.beta.sessions.archive(session.id)
    assert again.archived_at == archived.archived_at
    assert again.stats.duration_seconds == archived.stats.duration_seconds
    history = await server.history(session)
    assert [event.type for event in history[-2:]] == watch.types
    (thread,) = [t async for t in server.client.beta.sessions.threads.list(session.id)]
    assert thread.status == "terminated"
    frozen = await server.client.beta.sessions.threads.retrieve(thread.id, session_id=session.id)
    assert frozen.stats == thread.stats

    with pytest.raises(anthropic.BadRequestError, match="archived"):
        await server.say(session, "more")
    with pytest.raises(anthropic.BadRequestError, match="archived"):
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
    with pytest.raises(anthropic.BadRequestError, match="archived"):
        await server.client.beta.sessions.update(session.id, title="x")
    assert len(await server.history(session)) == len(history)
    assert (await server.client.beta.sessions.retrieve(session.id)).status == "terminated"


@pytest.mark.requirement("OBS-026", "OBS-027", "SES-054")
async def test_running_sessions_are_neither_archived_nor_deleted(server: Stack) -> None:
    session = await server.session([[stall(60), "never"]])
    async with server.watching(session) as watch:
        await server.say(session, "go")
        path = f"/v1/sessions/{session.id}"
        assert await server.refused("POST", f"{path}/archive") == (
            f'Session {session.id} cannot be archived while its status is "running". '
            "Only pending or idle sessions may be archived."
        )
        assert await server.refused("DELETE", path) == (
            "Cannot delete session while it is running. Send an interrupt event or wait for the session to complete."
        )
        # What clients are told to do: interrupt, wait, then archive or delete.
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
        await watch.idle()
        deleted = await server.client.beta.sessions.delete(session.id)
        await watch.end_reached()
    assert (deleted.id, deleted.type) == (session.id, "session_deleted")
    assert watch.events[-1].type == "session.deleted"


@pytest.mark.requirement("ENV-029", "EVT-058", "EVT-065", "SES-052", "SES-055")
async def test_delete(server: Stack) -> None:
    environment = await server.client.beta.environments.create(name="short-lived", config={"type": "cloud"})
    file = await server.upload()
    agent = await server.agent([[tool_use("bash", command="echo x > /mnt/session/outputs/x.txt")], "done"], tools=TOOLSET)
    session = await server.client.beta.sessions.create(
        agent=agent.id, environment_id=environment.id, resources=[{"type": "file", "file_id": file.id}]
    )
    await server.turn(session)
    outputs = [f async for f in server.client.beta.files.list(scope_id=session.id, betas=[BETA])]
    assert len(outputs) == 2
    watch_types: list[str] = []
    async with server.watching(session) as watch, server.watching(session) as second:
        await server.client.beta.sessions.delete(session.id)
        await watch.end_reached()
        await second.end_reached()
        watch_types = [event.type for event in watch.events]
    assert watch_types == ["session.deleted"]

    path = f"/v1/sessions/{session.id}"
    said = {
        await server.refused("GET", path, status=404),
        await server.refused("POST", path, status=404, json={"title": "x"}),
        await server.refused("DELETE", path, status=404),
        await server.refused("POST", f"{path}/archive", status=404),
        await server.refused("GET", f"{path}/events", status=404),
        await server.refused("POST", f"{path}/events", status=404, json={"events": [message("x")]}),
        await server.refused("GET", f"{path}/events/stream", status=404),
        await server.refused("GET", f"{path}/threads", status=404),
        await server.refused("GET", f"{path}/threads/sthr_01x", status=404),
    }
    assert len(said) == 1, said
    assert [s.id async for s in server.client.beta.sessions.list(agent_id=agent.id, include_archived=True)] == []
    # The environment is free at once, before anything was erased; the upload stays.
    await server.client.beta.environments.delete(environment.id)
    await server.client.beta.files.retrieve_metadata(file.id)

    with anyio.fail_after(WAIT_SECONDS):
        while await rows_of(server, session.id):
            await server.reconcile()
    for output in outputs:
        with pytest.raises(anthropic.NotFoundError):
            await server.client.beta.files.retrieve_metadata(output.id)


@pytest.mark.requirement("SES-053")
async def test_an_archived_session_can_be_deleted(server: Stack) -> None:
    session = await server.session()
    await server.client.beta.sessions.archive(session.id)
    await server.client.beta.sessions.delete(session.id)
    with pytest.raises(anthropic.NotFoundError):
        await server.client.beta.sessions.retrieve(session.id)


async def test_a_stream_learns_of_the_deletion_even_when_the_rows_are_gone(server: Stack) -> None:
    session = await server.session()
    async with server.watching(session) as watch:
        async with server.db.transaction() as tx:
            await tx.execute(
                text("UPDATE sessions SET deleted_at = now(), environment_id = NULL WHERE id = :id"), {"id": session.id}
            )
            await tx.execute(text("DELETE FROM session_threads WHERE session_id = :id"), {"id": session.id})
            await tx.execute(text("DELETE FROM sessions WHERE id = :id"), {"id": session.id})
        await watch.end_reached()
    assert [event.type for event in watch.events] == ["session.deleted"]


async def rows_of(server: Stack, session_id: str) -> int:
    """Rows that any table still has of the session."""
    tables = {
        "sessions": "id",
        "events": "session_id",
        "inbox": "session_id",
        "session_threads": "session_id",
        "session_resources": "session_id",
        "files": "session_id",
        "sandboxes": "session_id",
    }
    counts = " + ".join(f"(SELECT count(*) FROM {table} WHERE {column} = :id)" for table, column in tables.items())
    async with server.db.transaction() as tx:
        return (await tx.execute(text(f"SELECT {counts}"), {"id": session_id})).scalar_one()
