"""Another workspace's objects do not exist; the checks of a request come in their documented order."""

from typing import Any

import pytest

from managed_agents.web.actor import Scope
from tests.support.server import make_caller
from tests.support.stack import Stack, message, refusal

pytestmark = pytest.mark.anyio

UNKNOWN = "sesn_01unknown"


def routes(session_id: str, thread_id: str) -> list[tuple[str, str, dict[str, Any]]]:
    path = f"/v1/sessions/{session_id}"
    return [
        ("GET", path, {}),
        ("POST", path, {"json": {"title": "mine now"}}),
        ("DELETE", path, {}),
        ("POST", f"{path}/archive", {}),
        ("GET", f"{path}/events", {}),
        ("POST", f"{path}/events", {"json": {"events": [message("x")]}}),
        ("GET", f"{path}/events/stream", {}),
        ("GET", f"{path}/threads", {}),
        ("GET", f"{path}/threads/{thread_id}", {}),
    ]


@pytest.mark.requirement("CNV-055")
async def test_a_foreign_session_is_as_good_as_none(server: Stack) -> None:
    session = await server.session(["ok"])
    await server.turn(session)
    before = (await server.client.beta.sessions.retrieve(session.id)).to_dict()
    (thread,) = [t async for t in server.client.beta.sessions.threads.list(session.id)]
    theirs = server.headers(x_api_key=server.other.secret)
    for (method, path, options), (_, nowhere, _) in zip(routes(session.id, thread.id), routes(UNKNOWN, thread.id), strict=True):
        foreign = await server.refused(method, path, status=404, headers=theirs, **options)
        unknown = await server.refused(method, nowhere, status=404, headers=theirs, **options)
        assert foreign.replace(session.id, UNKNOWN) == unknown
    after = (await server.client.beta.sessions.retrieve(session.id)).to_dict()
    before.pop("stats")
    after.pop("stats")
    assert after == before
    assert [s.id async for s in server.stranger.beta.sessions.list(include_archived=True)] == []
    assert session.id not in [s.id async for s in server.stranger.beta.sessions.list(agent_id=session.agent.id)]


@pytest.mark.requirement("CNV-055")
async def test_foreign_references_do_not_exist(server: Stack) -> None:
    agent, file = await server.agent(), await server.upload()
    environment = await server.stranger.beta.environments.create(name="theirs", config={"type": "cloud"})
    own = await server.stranger.beta.agents.create(name="theirs", model="claude-opus-5")
    theirs = server.headers(x_api_key=server.other.secret)

    async def said(body: dict[str, Any]) -> str:
        return await server.refused("POST", "/v1/sessions", status=404, headers=theirs, json=body)

    known = {"agent": own.id, "environment_id": environment.id}
    for reference in (agent.id, {"type": "agent", "id": agent.id}, {"type": "agent", "id": agent.id, "version": 1}):
        assert f"{agent.id} not found" in await said({**known, "agent": reference})
    assert f"{server.environment_id} not found" in await said({**known, "environment_id": server.environment_id})
    assert f"{file.id} not found" in await said({**known, "resources": [{"type": "file", "file_id": file.id}]})
    assert [s.id async for s in server.stranger.beta.sessions.list()] == []


@pytest.mark.requirement("CNV-056")
async def test_a_foreign_cursor_shows_nothing_foreign(server: Stack) -> None:
    for _ in range(2):
        await server.session()
    cursor = (await server.raw("GET", "/v1/sessions?limit=1")).json()["next_page"]
    theirs = server.headers(x_api_key=server.other.secret)
    answer = await server.raw("GET", f"/v1/sessions?page={cursor}", headers=theirs)
    assert answer.json()["data"] == []
    mine, other = await server.session(["a"]), await server.session(["b"])
    await server.turn(mine)
    cursor = (await server.raw("GET", f"/v1/sessions/{mine.id}/events?limit=1")).json()["next_page"]
    assert await server.refused("GET", f"/v1/sessions/{other.id}/events?page={cursor}") == "invalid page cursor"


@pytest.mark.requirement("CNV-042")
async def test_a_cursor_is_good_for_the_list_of_its_own_parent(server: Stack) -> None:
    one, two = await server.agent(), await server.agent()
    for agent in (one, two):
        await server.client.beta.agents.update(agent.id, name="changed")
    cursor = (await server.raw("GET", f"/v1/agents/{one.id}/versions?limit=1")).json()["next_page"]
    assert (await server.raw("GET", f"/v1/agents/{one.id}/versions?page={cursor}")).status_code == 200
    assert await server.refused("GET", f"/v1/agents/{two.id}/versions?page={cursor}") == "invalid page cursor"


@pytest.mark.requirement("CNV-028", "CNV-033", "CNV-066", "OBS-021")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/sessions"),
        ("GET", "/v1/sessions"),
        *[(method, path) for method, path, _ in routes(UNKNOWN, "sthr_01x")],
    ],
)
async def test_the_order_of_checks(server: Stack, method: str, path: str) -> None:
    """Everything is wrong at first and put right one by one."""
    content = b"{not json" if method == "POST" else None
    headers: dict[str, str] = {"content-type": "application/json"}

    async def said(status: int) -> tuple[str, str]:
        answer = await server.http.request(method, path, headers=headers, content=content)
        return answer.json()["error"]["type"], refusal(answer, status=status)

    assert await said(401) == ("authentication_error", "Authentication failed")
    headers["x-api-key"] = "sk-ma-wrong"
    assert await said(401) == ("authentication_error", "Authentication failed")
    headers["authorization"] = f"Bearer {server.caller.secret}"
    assert await said(404) == ("not_found_error", "not found")
    headers["anthropic-beta"] = "something-else,managed-agents-2026-04-01,another-2026-01-01"
    assert await said(400) == ("invalid_request_error", "anthropic-version: header is required")
    headers["anthropic-version"] = "2023-06-01"
    headers["anthropic-workspace-id"] = "wrkspc_01other"
    assert (await said(403))[0] == "permission_error"
    headers["anthropic-workspace-id"] = server.caller.workspace_id
    if method == "POST":
        # A well-formed request at last, so only now the body is looked at.
        assert "invalid JSON" in (await said(400))[1]
        del headers["content-type"]
        answer = await server.http.request(method, path, headers=headers, content=content)
        assert answer.status_code == 400


@pytest.mark.requirement("CNV-031", "CNV-032")
async def test_headers_of_every_answer(server: Stack) -> None:
    answer = await server.raw("GET", "/v1/sessions")
    assert answer.headers["request-id"].startswith("req_")
    assert answer.headers["anthropic-workspace-id"] == server.caller.workspace_id
    assert answer.headers["anthropic-organization-id"]
    refused = await server.raw("GET", "/v1/sessions", headers={})
    assert refused.headers["request-id"].startswith("req_")
    assert "anthropic-workspace-id" not in refused.headers


@pytest.mark.requirement("ORG-003")
async def test_a_viewer_reads_only(server: Stack) -> None:
    session = await server.session()
    viewer = await make_caller(server.db, "viewer", Scope.VIEWER)
    headers = server.headers(x_api_key=viewer.secret)
    # Of another workspace, but what it may not do comes before what exists.
    for method, path, options in routes(session.id, "sthr_01x"):
        status = 404 if method == "GET" else 403
        await server.refused(method, path, status=status, headers=headers, **options)
    assert (await server.raw("GET", "/v1/sessions", headers=headers)).status_code == 200
    assert (await server.client.beta.sessions.retrieve(session.id)).title is None
