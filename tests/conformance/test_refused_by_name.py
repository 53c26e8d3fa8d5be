"""What docs/requirements says is refused by name is refused by name, one entry at a time.

When a feature is built its line here fails: the entry and its line go, and the feature's rules come.
"""

from typing import Any

import pytest

from tests.support.stack import MODEL, TOOLSET, Stack

pytestmark = pytest.mark.anyio

AGENTS, ENVIRONMENTS, SESSIONS = "/v1/agents", "/v1/environments", "/v1/sessions"
EVENTS = "/v1/sessions/{session}/events"
MCP = {"type": "url", "name": "x", "url": "https://example.com"}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        pytest.param(AGENTS, {"mcp_servers": [MCP]}, "mcp_servers", marks=pytest.mark.requirement("AGT-905")),
        pytest.param(
            AGENTS,
            {"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]},
            "tools.0.type",
            marks=pytest.mark.requirement("AGT-905"),
        ),
        pytest.param(
            AGENTS,
            {"skills": [{"type": "anthropic", "skill_id": "pdf"}], "tools": TOOLSET},
            "skills",
            marks=pytest.mark.requirement("AGT-906"),
        ),
        pytest.param(
            AGENTS,
            {"multiagent": {"type": "coordinator", "agents": [{"type": "self"}]}},
            "multiagent",
            marks=pytest.mark.requirement("AGT-907"),
        ),
        pytest.param(ENVIRONMENTS, {"config": {"type": "self_hosted"}}, "config.type", marks=pytest.mark.requirement("ENV-905")),
        pytest.param(ENVIRONMENTS, {"scope": "account"}, "scope", marks=pytest.mark.requirement("ENV-903")),
        pytest.param(
            SESSIONS,
            {"resources": [{"type": "memory_store", "memory_store_id": "memstore_01x"}]},
            "resources.0",
            marks=pytest.mark.requirement("SES-904"),
        ),
        pytest.param(SESSIONS, {"vault_ids": ["vlt_01x"]}, "vault_ids", marks=pytest.mark.requirement("SES-905")),
        pytest.param(
            EVENTS,
            {"events": [{"type": "user.define_outcome", "description": "x", "rubric": {"type": "text", "content": "y"}}]},
            "events.0",
            marks=pytest.mark.requirement("EVT-902"),
        ),
    ],
)
async def test_it_is_refused_by_name(server: Stack, path: str, body: dict[str, Any], named: str) -> None:
    agent = await server.agent(tools=TOOLSET)
    session = await server.client.beta.sessions.create(agent=agent.id, environment_id=server.environment_id)
    good: dict[str, Any] = {
        AGENTS: {"name": "r", "model": MODEL},
        ENVIRONMENTS: {"name": "refused", "config": {"type": "cloud"}},
        SESSIONS: {"agent": agent.id, "environment_id": server.environment_id},
    }.get(path, {})
    said = await server.refused("POST", path.format(session=session.id), json={**good, **body})
    assert said.startswith(f"{named}: "), said
    assert "not served" in said or "not supported" in said
