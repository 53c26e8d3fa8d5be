"""Agents through the SDK."""

import json
from typing import Any

import anthropic
import anyio
import httpx
import pytest
from anthropic import AsyncAnthropic

from managed_agents.resources.agents.schemas import AgentReference, AgentWithOverrides
from managed_agents.resources.agents.service import resolve_for_session

from .conftest import Served

pytestmark = pytest.mark.anyio

TOOLSET: Any = {"type": "agent_toolset_20260401"}
ALWAYS_ALLOW = {"type": "always_allow"}


@pytest.mark.requirement("AGT-001", "AGT-025", "AGT-030", "AGT-033", "AGT-903", "CNV-049", "OBS-037")
async def test_a_created_agent_shows_every_default(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(name="Coder", model="claude-opus-5-5", tools=[TOOLSET])
    assert agent.id.startswith("agent_")
    shown = agent.to_dict()
    assert shown["model"] == {"id": "claude-opus-5-5", "effort": {"type": "medium"}, "speed": "standard"}
    assert shown["tools"] == [
        {
            "type": "agent_toolset_20260401",
            "default_config": {"enabled": True, "permission_policy": ALWAYS_ALLOW},
            "configs": [],
        }
    ]
    assert shown["execution_identity"] == {"type": "service_account"}
    for name in ("description", "system", "multiagent", "archived_at"):
        assert shown[name] is None
    assert (shown["skills"], shown["mcp_servers"], shown["metadata"], shown["version"]) == ([], [], {}, 1)
    assert shown["created_at"] == shown["updated_at"]
    assert await client.beta.agents.retrieve(agent.id) == agent


@pytest.mark.requirement("AGT-025", "AGT-026", "AGT-030", "AGT-033", "AGT-903")
async def test_configs_are_echoed_resolved(client: AsyncAnthropic) -> None:
    toolset: Any = {
        **TOOLSET,
        "default_config": {"enabled": False},
        "configs": [{"name": "bash", "enabled": True}, {"name": "web_search"}],
    }
    agent = await client.beta.agents.create(
        name="Careful",
        model={"id": "my-model", "effort": "low", "speed": "fast", "inference_geo": "us"},
        tools=[toolset],
        execution_identity={"type": "aws_role", "role_arn": "arn:aws:iam::1:role/x"},
    )
    shown = agent.to_dict()
    assert shown["tools"][0]["configs"] == [
        {"type": "bash", "name": "bash", "enabled": True, "permission_policy": ALWAYS_ALLOW},
        {
            "type": "web_search",
            "name": "web_search",
            "enabled": False,
            "permission_policy": ALWAYS_ALLOW,
            "allowed_domains": None,
            "blocked_domains": None,
            "user_location": None,
        },
    ]
    assert shown["model"] == {
        "id": "my-model",
        "effort": {"type": "low"},
        "speed": "fast",
        "inference_geo": "us",
    }
    assert shown["execution_identity"] == {"type": "aws_role", "role_arn": "arn:aws:iam::1:role/x"}


@pytest.mark.requirement("AGT-022", "AGT-023", "AGT-035", "AGT-039", "AGT-041", "CNV-051", "CNV-052")
async def test_an_update_is_a_new_version_only_if_something_changes(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(
        name="A", model={"id": "m", "effort": "low"}, system="s", metadata={"a": "1", "b": "2"}
    )
    same = await client.beta.agents.update(agent.id, name="A", metadata={"a": "1"}, version=1)
    assert same == agent
    second = await client.beta.agents.update(
        agent.id, system="", description="d", metadata={"a": None, "c": "3"}, tools=[TOOLSET]
    )
    assert (second.version, second.system, second.description) == (2, None, "d")
    assert second.metadata == {"b": "2", "c": "3"}
    assert second.created_at == agent.created_at
    third = await client.beta.agents.update(agent.id, tools=None, metadata=None)
    assert (third.version, third.tools, third.metadata) == (3, [], second.metadata)
    assert await client.beta.agents.retrieve(agent.id, version=2) == second
    versions = [version async for version in client.beta.agents.versions.list(agent.id, limit=1)]
    assert versions == [third, second, agent]


@pytest.mark.requirement("AGT-027", "AGT-028")
async def test_effort_sticks_to_its_model(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(name="A", model={"id": "m", "effort": "max", "speed": "fast"})
    kept = await client.beta.agents.update(agent.id, model="m")
    assert kept.model.to_dict() == {"id": "m", "effort": {"type": "max"}, "speed": "standard"}
    changed = await client.beta.agents.update(agent.id, model={"id": "n"})
    assert changed.model.to_dict()["effort"] == {"type": "high"}
    for model, effort in (("claude-opus-5-5", "medium"), ("claude-haiku-5-5", "medium"), ("claude-opus-5", "high")):
        changed = await client.beta.agents.update(agent.id, model=model)
        assert changed.model.to_dict()["effort"] == {"type": effort}


@pytest.mark.requirement("AGT-036", "CNV-036", "OBS-028")
async def test_a_stale_version_is_refused_even_when_nothing_would_change(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(name="A", model="m")
    await client.beta.agents.update(agent.id, name="B")
    with pytest.raises(anthropic.ConflictError) as refused:
        await client.beta.agents.update(agent.id, name="B", version=1)
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert refused.value.body == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "Concurrent modification detected. Please fetch the latest version and retry.",
        },
        "request_id": refused.value.request_id,
    }
    assert (await client.beta.agents.retrieve(agent.id)).version == 2


@pytest.mark.requirement("AGT-037")
async def test_updates_at_once_give_each_its_own_version(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(name="A", model="m")
    seen: list[int] = []

    async def rename(name: str) -> None:
        seen.append((await client.beta.agents.update(agent.id, name=name)).version)

    async with anyio.create_task_group() as tasks:
        for index in range(8):
            tasks.start_soon(rename, f"A{index}")
    assert sorted(seen) == list(range(2, 10))


@pytest.mark.requirement("AGT-044", "CNV-044", "OBS-030", "OBS-034")
async def test_archiving_is_final_and_repeatable(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(name="A", model="m")
    archived = await client.beta.agents.archive(agent.id)
    assert archived.archived_at is not None
    assert archived.version == 1
    assert await client.beta.agents.archive(agent.id) == archived
    with pytest.raises(anthropic.BadRequestError, match="Cannot modify archived agent"):
        await client.beta.agents.update(agent.id, name="B")
    assert [shown.id async for shown in client.beta.agents.list()] == []
    assert [shown.id async for shown in client.beta.agents.list(include_archived=True)] == [agent.id]


@pytest.mark.requirement("AGT-020", "AGT-021")
async def test_lists_are_newest_first_and_page_without_gaps(client: AsyncAnthropic) -> None:
    made = [await client.beta.agents.create(name=f"A{index}", model="m") for index in range(5)]
    listed = [agent async for agent in client.beta.agents.list(limit=2)]
    assert listed == made[::-1]
    middle = made[2].created_at
    after = [agent.id async for agent in client.beta.agents.list(created_at_gte=middle)]
    before = [agent.id async for agent in client.beta.agents.list(created_at_lte=middle)]
    assert made[2].id in after
    assert made[2].id in before
    assert {made[3].id, made[4].id} <= set(after)
    assert {made[0].id, made[1].id} <= set(before)


@pytest.mark.requirement("CNV-055")
async def test_another_workspace_sees_nothing(client: AsyncAnthropic, stranger: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(name="A", model="m")
    messages: set[str] = set()
    for agent_id in (agent.id, "agent_011CZkZAtmR3yMPDzynEDxu7", "sesn_1", "agent_\x00"):
        for call in (
            stranger.beta.agents.retrieve,
            lambda id_: stranger.beta.agents.retrieve(id_, version=1),
            lambda id_: stranger.beta.agents.update(id_, name="B"),
            stranger.beta.agents.archive,
            stranger.beta.agents.versions.list,
        ):
            with pytest.raises(anthropic.NotFoundError) as missing:
                await call(agent_id)
            messages.add(missing.value.body["error"]["message"])  # pyright: ignore
    assert messages == {"Agent not found."}
    assert [shown async for shown in stranger.beta.agents.list()] == []
    assert await client.beta.agents.retrieve(agent.id) == agent


@pytest.mark.requirement("OBS-029")
async def test_an_unknown_version_is_named(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(name="A", model="m")
    with pytest.raises(anthropic.NotFoundError, match=r"Agent version not found\."):
        await client.beta.agents.retrieve(agent.id, version=999)


UNSERVED = [
    ("tools.0.type", {"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]}),
    ("mcp_servers", {"mcp_servers": [{"type": "url", "name": "x", "url": "https://x"}]}),
    ("skills", {"skills": [{"type": "anthropic", "skill_id": "pdf"}]}),
    ("multiagent", {"multiagent": {"type": "coordinator", "agents": []}}),
]


@pytest.mark.requirement("AGT-905", "AGT-906", "AGT-907")
@pytest.mark.parametrize(("path", "fields"), UNSERVED)
async def test_what_is_not_served_is_refused_by_name(client: AsyncAnthropic, path: str, fields: dict[str, Any]) -> None:
    agent = await client.beta.agents.create(name="A", model="m")
    with pytest.raises(anthropic.BadRequestError) as refused:
        await client.beta.agents.create(**{"name": "A", "model": "m", **fields})
    message = refused.value.body["error"]["message"]  # pyright: ignore
    assert message.startswith(f"{path}: ")
    assert message.endswith("not served yet by this server")
    with pytest.raises(anthropic.BadRequestError, match="not served yet by this server"):
        await client.beta.agents.update(agent.id, **fields)
    assert [shown async for shown in client.beta.agents.list()] == [agent]


CUSTOM: dict[str, Any] = {
    "type": "custom",
    "name": "weather",
    "description": "The weather of a city.",
    # The order of properties is part of what the model reads; keywords that nobody here knows are passed on.
    "input_schema": {
        "type": "object",
        "properties": {"z": {"type": "string"}, "a": {"type": ["integer", "null"]}},
        "required": ["z"],
        "$comment": "of course",
    },
}


@pytest.mark.requirement("AGT-050", "AGT-052")
async def test_custom_tools_and_policies_are_kept_as_they_were_sent(client: AsyncAnthropic) -> None:
    toolset: dict[str, Any] = {
        **TOOLSET,
        "default_config": {"permission_policy": {"type": "always_ask"}},
        "configs": [{"name": "bash", "permission_policy": {"type": "auto"}}, {"name": "read", "enabled": False}],
    }
    agent = await client.beta.agents.create(name="A", model="m", tools=[CUSTOM, toolset])  # pyright: ignore
    custom, resolved = agent.tools
    assert custom.to_dict() == CUSTOM
    assert list(custom.to_dict()["input_schema"]["properties"]) == ["z", "a"]  # pyright: ignore
    assert resolved.to_dict() == {
        "type": "agent_toolset_20260401",
        "default_config": {"enabled": True, "permission_policy": {"type": "always_ask"}},
        "configs": [
            {"type": "bash", "name": "bash", "enabled": True, "permission_policy": {"type": "auto"}},
            {"type": "read", "name": "read", "enabled": False, "permission_policy": {"type": "always_ask"}},
        ],
    }


@pytest.mark.requirement("AGT-052")
async def test_the_order_of_a_schemas_keys_is_kept_wherever_it_is_shown(raw: httpx.AsyncClient, served: Served) -> None:
    """Over plain HTTP: the SDK's own objects show the keys that it knows first."""
    schema = {
        "title": "first",
        "required": ["z"],
        "properties": {"z": {"type": "string", "description": "d", "default": 1}, "a": {"enum": [], "type": "null"}},
        "type": "object",
        "$comment": "last",
    }

    async def ask(method: str, path: str, body: Any = None) -> Any:
        answer = await raw.request(method, f"/v1/{path}", json=body, headers=served.headers())
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tools(schema: Any) -> list[Any]:
        return [{**CUSTOM, "input_schema": schema}]

    def shown(agent: Any) -> str:
        return json.dumps(agent["tools"][0]["input_schema"])

    agent = await ask("POST", "agents", {"name": "A", "model": "m", "tools": tools(schema)})
    environment = await ask("POST", "environments", {"name": "e"})
    session = await ask("POST", "sessions", {"agent": agent["id"], "environment_id": environment["id"]})
    agents, sessions = f"agents/{agent['id']}", f"sessions/{session['id']}"
    (version,) = (await ask("GET", f"{agents}/versions"))["data"]
    (listed,) = (await ask("GET", "agents"))["data"]
    (thread,) = (await ask("GET", f"{sessions}/threads"))["data"]
    retrieved = [await ask("GET", agents), (await ask("GET", sessions))["agent"]]
    for each in (agent, version, listed, session["agent"], thread["agent"], *retrieved):
        assert shown(each) == json.dumps(schema)

    # Another order is another schema to the model, and true is not 1.
    turned = {key: schema[key] for key in reversed(schema)}
    other = json.loads(json.dumps(schema).replace('"default": 1', '"default": true'))
    for number, changed in enumerate((turned, other), 2):
        updated = await ask("POST", agents, {"tools": tools(changed)})
        assert (updated["version"], shown(updated)) == (number, json.dumps(changed))
        assert await ask("POST", agents, {"tools": tools(changed)}) == updated
        replaced = await ask("POST", sessions, {"agent": {"tools": tools(changed)}})
        assert shown(replaced["agent"]) == json.dumps(changed)
        told = (await ask("GET", f"{sessions}/events?order=desc&limit=1"))["data"][0]
        assert (told["type"], shown(told["agent"])) == ("session.updated", json.dumps(changed))
        assert (await ask("POST", sessions, {"agent": {"tools": tools(changed)}}))["updated_at"] == replaced["updated_at"]


@pytest.mark.requirement("AGT-051")
@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ([{**CUSTOM, "name": ""}], "tools.0.name: "),
        ([{**CUSTOM, "name": "a" * 129}], "tools.0.name: "),
        ([{**CUSTOM, "name": "a b"}], "tools.0.name: "),
        ([{**CUSTOM, "name": "weather\n"}], "tools.0.name: "),
        ([{**CUSTOM, "name": "mcp__x"}], "tools.0.name: names that begin with mcp__ or ant__ are reserved"),
        ([{**CUSTOM, "name": "ant__x"}], "tools.0.name: names that begin with mcp__ or ant__ are reserved"),
        ([{**CUSTOM, "name": "web_fetch"}], 'tools.0.name: "web_fetch" is the name of a built-in tool'),
        ([CUSTOM, CUSTOM], 'tools.1.name: duplicate tool name "weather"'),
        ([{**CUSTOM, "description": ""}], "tools.0.description: "),
        ([{key: value for key, value in CUSTOM.items() if key != "description"}], "tools.0.description: "),
        ([{**CUSTOM, "input_schema": {"type": "array"}}], "tools.0.input_schema.type: "),
        ([{**CUSTOM, "input_schema": {"type": "object", "required": "z"}}], "tools.0.input_schema.required: "),
        ([{**CUSTOM, "permission_policy": {"type": "auto"}}], "tools.0.permission_policy: "),
        ([TOOLSET, *({**CUSTOM, "name": f"tool{n}"} for n in range(249))], "tools: at most 256 tools"),
        (
            [{**TOOLSET, "default_config": {"permission_policy": {"type": "never"}}}],
            "tools.0.default_config.permission_policy.type",
        ),
    ],
)
async def test_custom_tools_that_cannot_be(client: AsyncAnthropic, tools: list[Any], told: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        await client.beta.agents.create(name="A", model="m", tools=tools)
    assert refused.value.body["error"]["message"].startswith(told)  # pyright: ignore


@pytest.mark.requirement("AGT-054", "AGT-908")
async def test_definitions_of_tools_are_bounded_wherever_they_are_given(client: AsyncAnthropic) -> None:
    """Lists read a hundred agents into memory, and each session keeps a copy of its agent."""
    tool = {"type": "custom", "name": "a", "description": "d", "input_schema": {"type": "object", "x": "y" * 1_000_000}}
    agent = await client.beta.agents.create(name="A", model="m", tools=[tool])
    tools = [{**tool, "description": "d" * 100_000}]
    environment = await client.beta.environments.create(name="e")
    session = await client.beta.sessions.create(agent=agent.id, environment_id=environment.id)
    with_overrides: Any = {"type": "agent_with_overrides", "id": agent.id, "tools": tools}
    for prefix, sent in (
        ("", client.beta.agents.create(name="B", model="m", tools=tools)),
        ("", client.beta.agents.update(agent.id, tools=tools)),
        ("agent.", client.beta.sessions.create(agent=with_overrides, environment_id=environment.id)),
        ("agent.", client.beta.sessions.update(session.id, agent={"tools": tools})),
    ):
        with pytest.raises(anthropic.BadRequestError) as refused:
            await sent
        body: Any = refused.value.body
        assert body["error"]["message"] == f"{prefix}tools: more than 1 MB of definitions"


@pytest.mark.requirement("AGT-046", "SES-023")
async def test_a_session_gets_the_effective_agent(client: AsyncAnthropic, served: Served) -> None:
    first = await client.beta.agents.create(name="A", model="m", system="old", tools=[TOOLSET])
    await client.beta.agents.update(first.id, system="new")
    workspace_id = served.caller.workspace_id
    async with served.services.db.transaction() as tx:
        latest = await resolve_for_session(tx, workspace_id, first.id)
        pinned = await resolve_for_session(tx, workspace_id, AgentReference(type="agent", id=first.id, version=1))
        overridden = await resolve_for_session(
            tx,
            workspace_id,
            AgentWithOverrides.model_validate(
                {"type": "agent_with_overrides", "id": first.id, "model": "n", "system": None, "tools": []}
            ),
        )
    assert (latest["version"], latest["system"]) == (2, "new")
    assert (pinned["version"], pinned["system"]) == (1, "old")
    assert (overridden["version"], overridden["system"], overridden["tools"]) == (2, None, [])
    assert overridden["model"]["id"] == "n"
    assert set(latest) == {
        "id", "type", "version", "name", "description", "model", "system", "tools", "mcp_servers", "skills",
        "multiagent", "execution_identity",
    }  # fmt: skip
