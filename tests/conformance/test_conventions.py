"""What all objects have in common: ids, types, instants, and pages of twenty."""

import re
from typing import Any

import pytest

from tests.support.stack import MODEL, Stack

pytestmark = pytest.mark.anyio

MILLISECONDS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
MICROSECONDS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


async def one_of_each(server: Stack) -> dict[str, dict[str, Any]]:
    """An object of each kind as its bytes say it, by its type."""
    file = await server.upload()
    session = await server.session(["ok"], resources=[{"type": "file", "file_id": file.id, "mount_path": "/a"}])
    await server.turn(session)
    paths = {
        "agent": f"/v1/agents/{session.agent.id}",
        "environment": f"/v1/environments/{server.environment_id}",
        "session": f"/v1/sessions/{session.id}",
        "file": f"/v1/files/{file.id}",
    }
    found = {kind: (await server.raw("GET", path)).json() for kind, path in paths.items()}
    found["session_thread"] = (await server.raw("GET", f"{paths['session']}/threads")).json()["data"][0]
    found["resource"] = found["session"]["resources"][0]
    found["event"] = (await server.raw("GET", f"{paths['session']}/events?types[]=agent.message")).json()["data"][0]
    return found


@pytest.mark.requirement("CNV-047")
async def test_ids_name_their_kind(server: Stack) -> None:
    found = await one_of_each(server)
    prefixes = {
        "agent": "agent",
        "environment": "env",
        "session": "sesn",
        "file": "file",
        "session_thread": "sthr",
        "resource": "sesrsc",
        "event": "sevt",
    }
    for kind, prefix in prefixes.items():
        assert re.fullmatch(rf"{prefix}_01[0-9A-Za-z]{{22}}", found[kind]["id"]), (kind, found[kind]["id"])
    assert len({made["id"] for made in found.values()}) == len(found)
    answer = await server.raw("GET", "/v1/sessions")
    assert re.fullmatch(r"req_01[0-9A-Za-z]{22}", answer.headers["request-id"])
    assert answer.headers["anthropic-workspace-id"].startswith("wrkspc_01")


@pytest.mark.requirement("CNV-048", "CNV-049", "CNV-054")
async def test_objects_carry_their_type_and_instants(server: Stack) -> None:
    found = await one_of_each(server)
    event, resource = found.pop("event"), found.pop("resource")
    assert event["type"] == "agent.message"
    assert MICROSECONDS.fullmatch(event["processed_at"])
    assert "created_at" not in event
    assert resource["type"] == "file"
    for kind, shown in found.items():
        assert shown["type"] == kind
        assert MILLISECONDS.fullmatch(shown["created_at"]), kind
    for kind in ("agent", "environment", "session", "session_thread"):
        assert found[kind]["archived_at"] is None
        assert MILLISECONDS.fullmatch(found[kind]["updated_at"]), kind


@pytest.mark.requirement("CNV-038", "CNV-088")
async def test_a_page_has_twenty_items_unless_told_otherwise(server: Stack) -> None:
    agent = await server.agent()
    beta = server.client.beta
    for number in range(21):
        await beta.agents.update(agent.id, description=str(number))
        await beta.agents.create(name="page", model=MODEL)
        await beta.environments.create(name=f"page {number}", config={"type": "cloud"})
        await beta.sessions.create(agent=agent.id, environment_id=server.environment_id)
        await server.upload(b"")
    for path in ("agents", f"agents/{agent.id}/versions", "environments", "sessions", "files"):
        page = (await server.raw("GET", f"/v1/{path}")).json()
        assert len(page["data"]) == 20, path
        assert page["next_page"] is not None
        hundred = (await server.raw("GET", f"/v1/{path}?limit=100")).json()
        assert len(hundred["data"]) >= 21, path
        over = 1001 if path == "files" else 101
        assert (await server.refused("GET", f"/v1/{path}?limit={over}")).startswith("limit: "), path
    assert len((await server.raw("GET", "/v1/files?limit=1000")).json()["data"]) >= 21
