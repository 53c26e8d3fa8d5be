"""Single rules of agents and sessions that no story of another file needs."""

from typing import Any

import anthropic
import pytest
from anthropic.types.beta.agent_create_params import Model as ModelParam

from managed_agents.scripted_model import tool_use
from tests.support.stack import MODEL, TOOLSET, Gate, Stack

pytestmark = pytest.mark.anyio

TOOLS = ("bash", "edit", "glob", "grep", "read", "web_fetch", "web_search", "write")


@pytest.mark.requirement("AGT-028")
async def test_a_model_object_replaces_speed_and_region(server: Stack) -> None:
    agents = server.client.beta.agents
    agent = await agents.create(name="r", model={"id": "claude-opus-5", "speed": "fast", "inference_geo": "us", "effort": "low"})
    assert agent.model.to_dict() == {
        "id": "claude-opus-5",
        "effort": {"type": "low"},
        "speed": "fast",
        "inference_geo": "us",
    }
    updated = await agents.update(agent.id, model={"id": "claude-opus-5"})
    assert (updated.model.speed, updated.model.inference_geo) == ("standard", None)
    assert updated.version == 2


@pytest.mark.requirement("AGT-055", "AGT-056", "AGT-903", "SES-023")
async def test_what_a_model_does_not_take_is_refused_wherever_it_is_given(server: Stack) -> None:
    """Accepted, it would be shown and something else be done."""
    agents = server.client.beta.agents
    agent = await agents.create(name="r", model={"id": "claude-opus-4-6", "effort": "max"})
    before = await agents.retrieve(agent.id)
    refusals: list[tuple[ModelParam, str]] = [
        (
            {"id": "claude-opus-4-6", "effort": "xhigh"},
            'model.effort: "xhigh" is not supported by claude-opus-4-6, which takes low,',
        ),
        ({"id": "claude-opus-4-5-20251101", "effort": "max"}, 'model.effort: "max" is not supported by claude-opus-4-5-20251101'),
        ({"id": "claude-sonnet-4-5", "effort": "medium"}, 'model.effort: "medium" is not supported by claude-sonnet-4-5'),
        ({"id": "claude-haiku-4-5", "inference_geo": "us"}, "model.inference_geo: not supported by claude-haiku-4-5"),
    ]
    for model, told in refusals:
        overrides: Any = {"type": "agent_with_overrides", "id": agent.id, "model": model}
        for prefix, call in (
            ("", agents.create(name="r", model=model)),
            ("", agents.update(agent.id, model=model)),
            ("agent.", server.client.beta.sessions.create(agent=overrides, environment_id=server.environment_id)),
        ):
            with pytest.raises(anthropic.BadRequestError) as refused:
                await call
            assert prefix + told in str(refused.value)
    assert await agents.retrieve(agent.id) == before
    # What was shown may be sent back, also of a model without levels; an unknown model may take anything.
    shown = await agents.create(name="r", model="claude-haiku-4-5-20251001")
    again = await agents.update(shown.id, model={"id": shown.model.id, "effort": {"type": "high"}})
    assert again == shown
    unknown = await agents.create(name="r", model={"id": "claude-next", "effort": "xhigh", "inference_geo": "us"})
    assert unknown.model.effort is not None
    assert unknown.model.effort.type == "xhigh"


@pytest.mark.requirement("AGT-057")
async def test_a_dated_name_has_the_rules_of_its_model(server: Stack) -> None:
    agents = server.client.beta.agents
    agent = await agents.create(name="r", model={"id": "claude-opus-4-8-20260501", "speed": "fast"})
    assert agent.model.to_dict() == {"id": "claude-opus-4-8-20260501", "effort": {"type": "high"}, "speed": "fast"}
    newer = await agents.update(agent.id, model="claude-opus-5-5-20261007")
    assert newer.model.to_dict() == {"id": "claude-opus-5-5-20261007", "effort": {"type": "medium"}, "speed": "standard"}


@pytest.mark.requirement("AGT-034")
async def test_the_execution_identity_is_replaced_or_restored(server: Stack) -> None:
    agents = server.client.beta.agents
    agent = await agents.create(name="r", model=MODEL, execution_identity={"type": "aws_role", "role_arn": "arn:1"})
    kept = await agents.update(agent.id, name="s")
    assert kept.execution_identity.to_dict() == {"type": "aws_role", "role_arn": "arn:1"}
    restored = await agents.update(agent.id, execution_identity=None)
    assert restored.execution_identity.to_dict() == {"type": "service_account"}
    with pytest.raises(anthropic.BadRequestError, match="role_arn"):
        await agents.update(agent.id, execution_identity={"type": "aws_role", "role_arn": "x" * 2049})


@pytest.mark.requirement("AGT-039", "AGT-043")
async def test_text_is_cleared_by_null_or_nothing(server: Stack) -> None:
    agents = server.client.beta.agents
    agent = await agents.create(name="r", model=MODEL, system="s", description="d")
    cleared = await agents.update(agent.id, system=None, description="")
    assert (cleared.system, cleared.description, cleared.version) == (None, None, 2)
    tagged = await agents.update(agent.id, metadata={"only": "this"})
    assert (tagged.version, tagged.metadata) == (3, {"only": "this"})


@pytest.mark.requirement("AGT-044", "AGT-045")
async def test_sessions_keep_their_agent(server: Stack) -> None:
    session = await server.session(["as before", "still"])
    agents = server.client.beta.agents
    await agents.update(session.agent.id, name="changed", system="something else")
    watch = await server.turn(session)
    assert watch.logged[4].content[0].text == "as before"
    await agents.archive(session.agent.id)
    assert (await agents.retrieve(session.agent.id)).archived_at is not None
    await server.turn(session)
    found = await server.client.beta.sessions.retrieve(session.id)
    assert (found.agent.version, found.agent.name) == (1, "tester")


@pytest.mark.requirement("ENV-038")
async def test_sessions_of_one_environment_share_no_files(server: Stack) -> None:
    one = await server.session([[tool_use("bash", command="echo secret > /workspace/mine")], "done"], tools=TOOLSET)
    await server.turn(one)
    two = await server.session([[tool_use("bash", command="ls -A /workspace")], "done"], tools=TOOLSET)
    watch = await server.turn(two)
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert "mine" not in result.content[0].text


@pytest.mark.requirement("OBS-036")
async def test_the_toolset_has_eight_tools(server: Stack) -> None:
    configs = [{"name": name, "enabled": False} for name in TOOLS]
    agent = await server.agent(tools=[{**TOOLSET[0], "configs": configs}])
    assert [(config.type, config.name) for config in agent.tools[0].configs] == [(name, name) for name in TOOLS]
    for name in ("browser", "Bash", "computer", "code_execution", ""):
        body = {"name": "r", "model": MODEL, "tools": [{**TOOLSET[0], "configs": [{"name": name}]}]}
        assert (await server.refused("POST", "/v1/agents", json=body)).startswith("tools.0.configs.0.name")


@pytest.mark.requirement("OBS-047")
async def test_running_time_rises_while_running(server: Stack, held: Gate) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "done"], tools=TOOLSET)
    seconds: list[float] = []

    async def look() -> None:
        found = await server.client.beta.sessions.retrieve(session.id)
        assert found.status == "running"
        seconds.append(found.usage.active_seconds)

    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        await look()
        await look()
        held.open()
        await watch.idle()
    assert 0 <= seconds[0] < seconds[1]
    rested = (await server.client.beta.sessions.retrieve(session.id)).usage.active_seconds
    assert rested > seconds[1]
    assert (await server.client.beta.sessions.retrieve(session.id)).usage.active_seconds == rested


@pytest.mark.requirement("AGT-048")
async def test_versions_start_at_one(server: Stack) -> None:
    agent = await server.agent()
    for version in ("0", "-1", "x", "1.5"):
        assert (await server.refused("GET", f"/v1/agents/{agent.id}?version={version}")).startswith("version")
