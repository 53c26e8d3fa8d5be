"""Creating sessions: the three forms of an agent, resources, initial events, and everything that is refused."""

from typing import Any

import anthropic
import anyio
import pytest

from managed_agents.scripted_model import tool_use
from tests.support.stack import MODEL, TOOLSET, Stack, message

pytestmark = pytest.mark.anyio

PATH = "/v1/sessions"


async def count(server: Stack, agent: Any) -> int:
    """How many sessions the agent has: refusals must not change it."""
    return len([session async for session in server.client.beta.sessions.list(agent_id=agent.id, include_archived=True)])


@pytest.mark.requirement("AGT-046", "CNV-048", "OBS-040", "SES-020", "SES-024", "SES-032")
async def test_an_id_means_the_latest_version(server: Stack) -> None:
    agent = await server.agent()
    newer = await server.client.beta.agents.update(agent.id, version=agent.version, description="newer")
    session = await server.client.beta.sessions.create(agent=agent.id, environment_id=server.environment_id)

    assert session.id.startswith("sesn_01")
    assert (session.type, session.status, session.title, session.metadata) == ("session", "idle", None, {})
    assert (session.agent.type, session.agent.id, session.agent.version) == ("agent", agent.id, newer.version)
    assert session.agent.description == "newer"
    assert not {"metadata", "created_at"} & set(session.agent.to_dict())
    assert (session.environment_id, session.vault_ids, session.deployment_id) == (server.environment_id, [], None)
    assert (session.budget, session.archived_at, session.resources, session.outcome_evaluations) == (None, None, [], [])
    assert session.usage.input_tokens == 0
    assert session.stats.active_seconds == 0
    raw = (await server.raw("GET", f"{PATH}/{session.id}")).json()
    assert raw["usage"]["cache_creation"] is None
    assert raw["created_at"].endswith("Z")
    assert len(raw["created_at"]) == len("2026-04-03T18:24:10.412Z")
    assert [event async for event in server.client.beta.sessions.events.list(session.id)] == []


@pytest.mark.requirement("AGT-046", "OBS-029", "SES-020", "SES-030")
async def test_a_reference_may_pin_a_version(server: Stack) -> None:
    agent = await server.agent()
    await server.client.beta.agents.update(agent.id, version=agent.version, description="newer")
    create = server.client.beta.sessions.create
    pinned = await create(agent={"type": "agent", "id": agent.id, "version": 1}, environment_id=server.environment_id)
    assert (pinned.agent.version, pinned.agent.description) == (1, None)
    latest = await create(agent={"type": "agent", "id": agent.id}, environment_id=server.environment_id)
    assert latest.agent.version == 2

    with pytest.raises(anthropic.NotFoundError) as missing:
        await create(agent={"type": "agent", "id": agent.id, "version": 999}, environment_id=server.environment_id)
    assert "agent.version: 999 not found" in str(missing.value)


@pytest.mark.requirement("SES-020", "SES-021", "SES-022", "SES-023")
async def test_overrides_replace_or_clear(server: Stack) -> None:
    agent = await server.agent(tools=TOOLSET, description="kept")
    create = server.client.beta.sessions.create
    base: dict[str, Any] = {"type": "agent_with_overrides", "id": agent.id}

    replaced = await create(
        agent={**base, "model": "claude-haiku-4-5", "system": "other", "tools": []}, environment_id=server.environment_id
    )
    assert (replaced.agent.id, replaced.agent.version) == (agent.id, 1)
    assert replaced.agent.model.id == "claude-haiku-4-5"
    assert (replaced.agent.system, replaced.agent.tools, replaced.agent.description) == ("other", [], "kept")

    cleared = await create(agent={**base, "system": None, "tools": None}, environment_id=server.environment_id)
    assert (cleared.agent.system, cleared.agent.tools) == (None, [])
    assert cleared.agent.model.id == MODEL

    inherited = await create(agent={**base, "version": 1}, environment_id=server.environment_id)
    assert inherited.agent.system == agent.system
    assert len(inherited.agent.tools) == 1
    # Nothing was written to the agent.
    stored = await server.client.beta.agents.retrieve(agent.id)
    assert (stored.version, stored.system) == (1, agent.system)

    with pytest.raises(anthropic.BadRequestError) as refused:
        await create(agent={**base, "model": None}, environment_id=server.environment_id)  # pyright: ignore
    assert "agent_model_required" in str(refused.value)


@pytest.mark.requirement("SES-021")
async def test_an_override_reaches_the_model(server: Stack) -> None:
    agent = await server.agent(["never"])
    other = server.replies.add(["overridden"])
    session = await server.client.beta.sessions.create(
        agent={"type": "agent_with_overrides", "id": agent.id, "system": f"be {other}"}, environment_id=server.environment_id
    )
    watch = await server.turn(session)
    assert watch.logged[4].content[0].text == "overridden"
    assert server.replies.seen[other][0].tools == []


@pytest.mark.requirement("SES-026")
async def test_title_and_metadata(server: Stack) -> None:
    session = await server.session(title="Audit ✓", metadata={"k" * 64: "v" * 512, "empty": ""})
    assert session.title == "Audit ✓"
    assert session.metadata == {"k" * 64: "v" * 512, "empty": ""}


@pytest.mark.requirement("CNV-022", "CNV-050", "SES-026", "SES-028", "SES-031", "SES-044", "SES-904", "SES-905", "SES-907")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"title": "x" * 501}, "title"),
        ({"title": 5}, "title"),
        ({"metadata": {"k" * 65: "v"}}, "metadata.k"),
        ({"metadata": {"": "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"metadata": []}, "metadata"),
        ({"vault_ids": ["vlt_01x"]}, "vault_ids"),
        ({"budget": {"type": "limit", "max_list_cost": {"amount": "100"}}}, "budget.max_list_cost.currency"),
        ({"resources": [{"type": "memory_store", "memory_store_id": "memstore_01x"}]}, "resources.0"),
        ({"resources": [{"type": "volume"}]}, "resources.0.type"),
        ({"resources": [{"type": "file"}]}, "resources.0.file_id"),
        ({"resources": [{"type": "file", "file_id": "file_01x", "mode": "rw"}]}, "resources.0.mode"),
        ({"resources": [{"type": "file", "file_id": "file_01x"}] * 501}, "resources"),
        ({"resources": {}}, "resources"),
        ({"initial_events": [{"type": "user.define_outcome", "description": "x"}]}, "initial_events.0"),
        ({"initial_events": [{"type": "user.interrupt"}]}, "initial_events.0.type"),
        ({"initial_events": [{"type": "system.message", "content": []}]}, "initial_events.0"),
        ({"initial_events": [message("ok"), {"type": "user.message", "content": []}]}, "initial_events.1.content"),
        ({"initial_events": [message("x")] * 51}, "initial_events"),
        ({"initial_events": [message(" \n\t")]}, "initial_events.0.content.0.text"),
        ({"initial_events": "hello"}, "initial_events"),
        ({"agent": 7}, "agent"),
        ({"agent": None}, "agent"),
        ({"agent": {"id": "agent_01x"}}, "agent.type"),
        ({"agent": {"type": "agent"}}, "agent.id"),
        ({"agent": {"type": "agent", "id": "agent_01x", "system": "x"}}, "agent.system"),
        ({"agent": {"type": "agent", "id": "agent_01x", "version": 0}}, "agent.version"),
        ({"agent": {"type": "agent", "id": "agent_01x", "version": "1"}}, "agent.version"),
        ({"environment_id": None}, "environment_id"),
        ({"environment_id": 3}, "environment_id"),
        ({"sandbox": "big"}, "sandbox"),
    ],
)
async def test_refused_fields_are_named(server: Stack, fields: dict[str, Any], named: str) -> None:
    agent = await server.agent()
    body = {"agent": agent.id, "environment_id": server.environment_id, **fields}
    said = await server.refused("POST", PATH, json=body)
    assert said.startswith(named), said
    assert await count(server, agent) == 0


@pytest.mark.requirement("SES-025", "SES-031")
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"mcp_servers": [{"type": "url", "name": "x", "url": "https://x"}]}, "agent.mcp_servers"),
        ({"skills": [{"type": "anthropic", "skill_id": "xlsx"}]}, "agent.skills"),
        (
            {"tools": [{"type": "custom", "name": "x", "description": "x", "input_schema": {}}]},
            "agent.tools.0.input_schema.type",
        ),
        (
            {"tools": [{"type": "custom", "name": "bash", "description": "x", "input_schema": {"type": "object"}}]},
            "agent.tools.0.name",
        ),
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]}, "agent.tools.0.type"),
        (
            {"tools": [{**TOOLSET[0], "default_config": {"permission_policy": {"type": "sometimes"}}}]},
            "agent.tools.0.default_config.permission_policy.type",
        ),
        ({"tools": [{**TOOLSET[0], "configs": [{"name": "web_search", "enabled": True}]}]}, "agent.tools.0.configs.0.name"),
        ({"tools": [{**TOOLSET[0], "configs": [{"name": "browser"}]}]}, "agent.tools.0.configs.0.name"),
        ({"multiagent": {}}, "agent.multiagent"),
        ({"system": "x" * 100_001}, "agent.system"),
        ({"model": ""}, "agent.model"),
    ],
)
async def test_refused_overrides_are_named(server: Stack, override: dict[str, Any], named: str) -> None:
    agent = await server.agent()
    body = {"agent": {"type": "agent_with_overrides", "id": agent.id, **override}, "environment_id": server.environment_id}
    said = await server.refused("POST", PATH, json=body)
    assert said.startswith(named), said
    assert await count(server, agent) == 0


@pytest.mark.requirement("AGT-044", "ENV-030", "SES-030")
async def test_missing_and_unusable_references(server: Stack) -> None:
    agent = await server.agent()
    known = {"agent": agent.id, "environment_id": server.environment_id}
    refused = server.refused
    assert "agent: agent_01nope not found" in await refused("POST", PATH, json={**known, "agent": "agent_01nope"}, status=404)
    assert "agent" in await refused("POST", PATH, json={**known, "agent": ""}, status=404)
    said = await refused("POST", PATH, json={**known, "environment_id": "env_01nope"}, status=404)
    assert "environment_id: env_01nope not found" in said
    resources = [{"type": "file", "file_id": "file_01nope"}]
    assert "resources.0.file_id" in await refused("POST", PATH, json={**known, "resources": resources}, status=404)
    assert "agent" in await refused("POST", PATH, json={"environment_id": server.environment_id})
    assert "environment_id" in await refused("POST", PATH, json={"agent": agent.id})

    environment = await server.client.beta.environments.create(name="gone", config={"type": "cloud"})
    await server.client.beta.environments.archive(environment.id)
    assert "archived" in await refused("POST", PATH, json={**known, "environment_id": environment.id})
    await server.client.beta.agents.archive(agent.id)
    assert "archived" in await refused("POST", PATH, json=known)
    assert await count(server, agent) == 0


@pytest.mark.requirement("OBS-038", "SES-042", "SES-043")
async def test_file_resources_are_copies_at_their_paths(server: Stack) -> None:
    first, second = await server.upload(b"one\n", "a.txt"), await server.upload(b"two\n", "b.txt")
    session = await server.session(
        [[tool_use("bash", command=f"cat /mnt/session/uploads/{first.id} /mnt/session/uploads/in/b.txt")], "done"],
        tools=TOOLSET,
        resources=[
            {"type": "file", "file_id": first.id},
            {"type": "file", "file_id": second.id, "mount_path": "/in/b.txt"},
        ],
    )
    default, given = session.resources
    assert default.type == "file"
    assert default.id.startswith("sesrsc_")
    assert default.file_id not in (first.id, given.file_id)
    assert default.mount_path == f"/mnt/session/uploads/{first.id}"
    assert given.mount_path == "/in/b.txt"
    copy = await server.client.beta.files.retrieve_metadata(given.file_id)
    assert (copy.filename, copy.size_bytes, copy.downloadable) == ("b.txt", 4, False)
    assert copy.scope is not None
    assert copy.scope.id == session.id
    assert [r.to_dict() for r in (await server.client.beta.sessions.retrieve(session.id)).resources] == [
        r.to_dict() for r in session.resources
    ]
    # The copy outlives the original.
    await server.client.beta.files.delete(second.id)
    watch = await server.turn(session)
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert result.content[0].text.strip().splitlines() == ["one", "two"]


@pytest.mark.requirement("OBS-033", "SES-031")
@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["/../etc/passwd"], "escapes /uploads/"),
        (["a/../../b"], "escapes /uploads/"),
        (["/mnt/session/uploads/../x"], "escapes /uploads/"),
        (["/x", "/x"], "overlaps another resource"),
        (["/x", "x"], "overlaps another resource"),
        (["/x", "/mnt/session/uploads/x"], "overlaps another resource"),
        (["/x", "/x/y"], "overlaps another resource"),
        (["/x/y/z", "/x"], "overlaps another resource"),
        (["/"], "mount_path"),
        ([""], "mount_path"),
        (["/mnt/session/uploads/"], "mount_path"),
        (["/a\nb"], "mount_path"),
        (["/" + "x" * 1025], "mount_path"),
        (["/" + "x" * 300], "mount_path"),
    ],
)
async def test_bad_mount_paths(server: Stack, paths: list[str], said: str) -> None:
    agent, file = await server.agent(), await server.upload()
    resources = [{"type": "file", "file_id": file.id, "mount_path": path} for path in paths]
    body = {"agent": agent.id, "environment_id": server.environment_id, "resources": resources}
    answer = await server.refused("POST", PATH, json=body)
    assert answer.startswith(f"resources.{len(paths) - 1}.mount_path")
    assert said in answer
    assert await count(server, agent) == 0
    # Not a single copy was left behind.
    assert (await server.client.beta.files.retrieve_metadata(file.id)).size_bytes == 5


@pytest.mark.requirement("ENV-029")
async def test_an_environment_deleted_meanwhile(server: Stack) -> None:
    """Whoever comes first: the session exists with its environment, or neither does."""
    agent = await server.agent()
    for number in range(15):
        environment = await server.client.beta.environments.create(name="contended", config={"type": "cloud"})
        statuses: list[int] = []

        async def create(environment_id: str, seen: list[int]) -> None:
            answer = await server.raw("POST", PATH, json={"agent": agent.id, "environment_id": environment_id})
            seen.append(answer.status_code)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(create, environment.id, statuses)
            if number % 2:
                await anyio.sleep(0.002 * number)
            deleted = await server.raw("DELETE", f"/v1/environments/{environment.id}")
        assert set(statuses) <= {200, 404}
        assert deleted.status_code == (409 if 200 in statuses else 200)
        await server.raw("POST", f"/v1/environments/{environment.id}/archive")


@pytest.mark.requirement("SES-029")
async def test_no_initial_events_is_the_same_as_an_empty_list(server: Stack) -> None:
    session = await server.session(initial_events=[])
    assert session.status == "idle"
    assert await server.history(session) == []


@pytest.mark.requirement("SES-028")
async def test_fifty_initial_events(server: Stack) -> None:
    session = await server.session(["ok"], initial_events=[message(str(n)) for n in range(50)])
    await server.idle(session)
    history = await server.history(session, types=["user.message"])
    assert [event.content[0].text for event in history] == [str(n) for n in range(50)]
