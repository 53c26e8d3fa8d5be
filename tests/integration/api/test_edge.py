"""What every endpoint has in common: checks and their order, the envelope, bad input, bounds."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text

from managed_agents.api import health
from managed_agents.resources.keys import service as keys
from managed_agents.resources.services import Services
from managed_agents.web.actor import Scope
from tests.support.server import HMAC_KEY

from .conftest import Served

pytestmark = pytest.mark.anyio


def refused(answer: httpx.Response, status: int, error_type: str, message: str) -> None:
    """Assert that `answer` is the envelope with what is given; `message` is its beginning."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == answer.headers["request-id"]
    assert body["request_id"].startswith("req_")
    assert body["error"]["type"] == error_type
    assert body["error"]["message"].startswith(message), body


@pytest.mark.requirement("CNV-024", "CNV-028", "CNV-032", "CNV-066", "OBS-020", "OBS-021")
async def test_the_checks_come_in_the_hosted_order(raw: httpx.AsyncClient, served: Served) -> None:
    refused(await raw.post("/v1/nothing"), 404, "not_found_error", "not found")
    refused(await raw.post("/v1/agents", content=b"{"), 401, "authentication_error", "Authentication failed")
    key = {"x-api-key": served.caller.secret}
    answer = await raw.post("/v1/agents", content=b"{", headers=key)
    refused(answer, 404, "not_found_error", "not found")
    assert answer.headers["anthropic-workspace-id"] == served.caller.workspace_id
    assert answer.headers["anthropic-organization-id"].startswith("org_")
    key["anthropic-beta"] = "other-2026-01-01, managed-agents-2026-04-01"
    version = "anthropic-version: header is required"
    refused(await raw.post("/v1/agents", content=b"{", headers=key), 400, "invalid_request_error", version)
    key["anthropic-version"] = "2026-10-21"
    answer = await raw.post("/v1/agents", content=b"{", headers=key)
    refused(answer, 400, "invalid_request_error", "content-type: must be application/json")
    answer = await raw.post("/v1/agents", content=b"{", headers=key | {"content-type": "application/json"})
    refused(answer, 400, "invalid_request_error", "body: invalid JSON")


@pytest.mark.requirement("CNV-001", "CNV-026", "CNV-089")
async def test_keys_come_in_either_header(raw: httpx.AsyncClient, served: Served) -> None:
    headers = served.headers(without="x-api-key")
    bearer = {"authorization": f"Bearer {served.caller.secret}"}
    right = {"x-api-key": served.caller.secret}
    # A proxy may add a token of its own beside the client's key, and a client keep an old key beside its token.
    for good in (
        bearer,
        right | {"authorization": "Bearer of-the-proxy"},
        right | {"authorization": "Bearer " + "x" * 5000},
        right | {"authorization": "Basic eDp5"},
        bearer | {"x-api-key": "sk-ma-nonsense"},
        bearer | right,
    ):
        answer = await raw.get("/v1/agents", headers=headers | good)
        assert answer.status_code == 200, good
        assert answer.headers["anthropic-workspace-id"] == served.caller.workspace_id
    # Of two keys the token counts.
    both = bearer | {"x-api-key": served.stranger.secret}
    answer = await raw.get("/v1/agents", headers=headers | both)
    assert answer.headers["anthropic-workspace-id"] == served.caller.workspace_id
    for bad in (
        {},
        {"authorization": "Bearer sk-ma-nonsense", "x-api-key": "sk-ma-other-nonsense"},
        {"x-api-key": "sk-ma-nonsense"},
        {"authorization": f"Basic {served.caller.secret}"},
        {"x-api-key": "x" * 5000},
    ):
        answer = await raw.get("/v1/agents", headers=headers | bad)
        refused(answer, 401, "authentication_error", "Authentication failed")
        assert "anthropic-workspace-id" not in answer.headers


@pytest.mark.requirement("CNV-025")
async def test_a_workspace_header_must_match(raw: httpx.AsyncClient, served: Served) -> None:
    right = served.headers() | {"anthropic-workspace-id": served.caller.workspace_id}
    assert (await raw.get("/v1/agents", headers=right)).status_code == 200
    wrong = served.headers() | {"anthropic-workspace-id": served.stranger.workspace_id}
    refused(await raw.get("/v1/agents", headers=wrong), 403, "permission_error", "anthropic-workspace-id: ")


@pytest.mark.requirement("CNV-029", "OBS-022", "OBS-048")
async def test_unexpected_beta_values_matter_on_environments_and_files(raw: httpx.AsyncClient, served: Served) -> None:
    unknown = served.headers(anthropic_beta="managed-agents-2026-04-01,made-up-2026-01-01")
    both = served.headers(anthropic_beta="managed-agents-2026-04-01,environments-2025-11-01")
    assert (await raw.get("/v1/agents", headers=unknown)).status_code == 200
    assert (await raw.get("/v1/agents", headers=both)).status_code == 200
    for path, headers in (("/v1/environments", unknown), ("/v1/files", unknown), ("/v1/environments", both)):
        answer = await raw.get(path, headers=headers)
        refused(answer, 400, "invalid_request_error", "anthropic-beta: Unexpected value(s) `")
    without = served.headers(without="anthropic-beta")
    refused(await raw.get("/v1/environments", headers=without), 404, "not_found_error", "not found")
    assert (await raw.get("/v1/files", headers=without)).status_code == 200
    older = served.headers(anthropic_beta="files-api-2025-04-14")
    assert (await raw.get("/v1/files", headers=older)).status_code == 200


@pytest.mark.requirement("ORG-003", "CNV-033")
async def test_scopes_are_checked(raw: httpx.AsyncClient, served: Served) -> None:
    made = await keys.create(
        served.services.db,
        HMAC_KEY,
        workspace_id=served.caller.workspace_id,
        name="viewer",
        scope=Scope.VIEWER,
    )
    headers = served.headers() | {"x-api-key": made.secret.get_secret_value()}
    assert (await raw.get("/v1/agents", headers=headers)).status_code == 200
    for path in ("/v1/agents", "/v1/environments", "/v1/files"):
        answer = await raw.post(path, content=b"{}", headers=headers)
        refused(answer, 403, "permission_error", "This API key lacks the scope `developer`")
        assert answer.json()["error"]["details"] == {"error_code": "api_key_scope_missing"}


GOOD: dict[str, Any] = {"name": "A", "model": "m"}
TOOL: dict[str, Any] = {"type": "agent_toolset_20260401"}


def with_(**fields: Any) -> bytes:
    return json.dumps(GOOD | fields).encode()


def tool(**fields: Any) -> bytes:
    return with_(tools=[TOOL | fields])


BAD_AGENTS: list[tuple[str, bytes]] = [
    ("body: a JSON object is required", b""),
    ("body: invalid JSON at line 1 column ", b'{"name": "A",}'),
    ("body: invalid JSON", b'{"name": NaN, "model": "m"}'),
    ("body: Input should be an object", b"[]"),
    ("body: Input should be an object", b'"text"'),
    ("body: not valid UTF-8", b'{"name": "\xff"}'),
    ("name: Field required", b'{"model": "m"}'),
    ("model: Field required", b'{"name": "A"}'),
    ("name: Input should be a valid string", with_(name=5)),
    ("name: Input should be a valid string", with_(name=None)),
    ("name: String should have at least 1 character", with_(name="")),
    ("name: String should have at most 256 characters", with_(name="x" * 257)),
    ("system: String should have at most 100000 characters", with_(system="x" * 100_001)),
    ("description: String should have at most 2048 characters", with_(description="x" * 2049)),
    ("color: Extra inputs are not permitted", with_(color="red")),
    ("model.temperature: Extra inputs are not permitted", with_(model={"id": "m", "temperature": 1})),
    ("model: Input should be a string or an object", with_(model=5)),
    ("model.id: Field required", with_(model={})),
    ("model: String should have at least 1 character", with_(model="")),
    ("model.effort: Input should be 'low', 'medium'", with_(model={"id": "m", "effort": "huge"})),
    ("model.effort.type: Input should be 'low'", with_(model={"id": "m", "effort": {"type": "huge"}})),
    ("model.speed: Input should be 'standard' or 'fast'", with_(model={"id": "m", "speed": "warp"})),
    ('model.speed: "fast" is not supported', with_(model={"id": "claude-haiku-4-5", "speed": "fast"})),
    ('model.speed: "fast" is not supported', with_(model={"id": "claude-opus-4-7-20260301", "speed": "fast"})),
    ('model.effort: "xhigh" is not supported by claude-opus-4-6, ', with_(model={"id": "claude-opus-4-6", "effort": "xhigh"})),
    ('model.effort: "low" is not supported', with_(model={"id": "claude-haiku-4-5", "effort": {"type": "low"}})),
    ("model.inference_geo: not supported by claude-opus-4-5", with_(model={"id": "claude-opus-4-5", "inference_geo": "us"})),
    ("model.inference_geo: Input should be 'us'", with_(model={"id": "m", "inference_geo": "moon"})),
    ("tools: Input should be a valid list", with_(tools={})),
    ("tools: List should have at most 256 items", with_(tools=[TOOL] * 257)),
    ("tools.0: Input should be an object", with_(tools=["bash"])),
    ("tools.0.type: Field required", with_(tools=[{}])),
    ("tools.0.type: Input should be ", with_(tools=[{"type": "agent_toolset_20990101"}])),
    ("tools.1.type: only one agent_toolset_20260401", with_(tools=[TOOL, TOOL])),
    ("tools.0.extra: Extra inputs are not permitted", tool(extra=1)),
    ("tools.0.configs.0.name: Field required", tool(configs=[{"enabled": True}])),
    ("tools.0.configs.0.name: Input should be ", tool(configs=[{"name": "telnet"}])),
    ("tools.0.configs.1.name: duplicate tool name", tool(configs=[{"name": "bash"}] * 2)),
    ("tools.0.configs.0.type: Input should be 'bash'", tool(configs=[{"name": "bash", "type": "read"}])),
    (
        "tools.0.configs.0.enabled: Input should be a valid boolean",
        tool(configs=[{"name": "bash", "enabled": 1}]),
    ),
    (
        "tools.0.default_config.enabled: Input should be a valid boolean",
        tool(default_config={"enabled": "no"}),
    ),
    (
        "tools.0.default_config.permission_policy.type: Input should be ",
        tool(default_config={"permission_policy": {"type": "sometimes"}}),
    ),
    ("metadata: Input should be an object", with_(metadata=[])),
    ("metadata.k: Input should be a valid string", with_(metadata={"k": 1})),
    ("metadata: at most 16 pairs", with_(metadata={str(index): "" for index in range(17)})),
    (f"metadata.{'k' * 64}: keys must have", with_(metadata={"k" * 65: ""})),
    ("metadata.k: values must have at most 512", with_(metadata={"k": "v" * 513})),
    ("execution_identity.type: Input should be ", with_(execution_identity={"type": "root"})),
    ("execution_identity.role_arn: Field required", with_(execution_identity={"type": "aws_role"})),
    ("system: text must not contain NUL", with_(system="a\0b")),
    ("metadata.k: text must not contain NUL", with_(metadata={"k": "\0"})),
    ("metadata.k\\u0000: text must not contain NUL", with_(metadata={"k\0": ""})),
    ("system: text must not contain unpaired surrogates", with_(system="\ud800")),
    ("metadata.\ufffd: text must not contain unpaired", with_(metadata={"\udfff": ""})),
    ("metadata.k: number out of range", b'{"name":"A","model":"m","metadata":{"k":9223372036854775808}}'),
    ("tools.0.0.0.0…: nested more than 100 levels deep", with_(tools=json.loads("[" * 150 + "]" * 150))),
    ("body: ", b"[" * 100_000),
]


@pytest.mark.requirement(
    "AGT-002",
    "AGT-003",
    "AGT-026",
    "AGT-029",
    "AGT-055",
    "AGT-056",
    "AGT-031",
    "AGT-032",
    "CNV-022",
    "CNV-031",
    "CNV-050",
    "CNV-057",
    "CNV-058",
    "CNV-059",
    "OBS-036",
)
@pytest.mark.parametrize(("message", "content"), BAD_AGENTS, ids=[message[:60] for message, _ in BAD_AGENTS])
async def test_bad_bodies_name_the_field_and_change_nothing(
    raw: httpx.AsyncClient, served: Served, message: str, content: bytes
) -> None:
    message = message.replace("\ufffd", "?")
    answer = await raw.post("/v1/agents", content=content, headers=served.headers())
    refused(answer, 400, "invalid_request_error", message)
    listed = await raw.get("/v1/agents", headers=served.headers())
    assert listed.json() == {"data": []}


@pytest.mark.requirement("AGT-038", "AGT-040", "AGT-042", "CNV-020")
async def test_bad_updates_change_nothing(client: AsyncAnthropic, raw: httpx.AsyncClient, served: Served) -> None:
    agent = await client.beta.agents.create(name="A", model="m", metadata={"a": "1"})
    for message, fields in (
        ("name: Input should be a valid string", {"name": None}),
        ("model: Input should be a string or an object", {"model": None}),
        ("version: Input should be greater than or equal to 1", {"version": 0}),
        ("version: Input should be a valid integer", {"version": "1"}),
        ("version: Input should be a valid integer", {"version": 1.0}),
        ("version: Input should be less than or equal to 2147483647", {"version": 2**31}),
        ("id: Extra inputs are not permitted", {"id": "agent_x"}),
        ("metadata: at most 16 pairs", {"metadata": {str(index): "" for index in range(16)}}),
    ):
        answer = await raw.post(f"/v1/agents/{agent.id}", json=fields, headers=served.headers())
        refused(answer, 400, "invalid_request_error", message)
    assert await client.beta.agents.retrieve(agent.id) == agent
    answer = await raw.post(f"/v1/agents/{agent.id}/archive", json={"force": True}, headers=served.headers())
    refused(answer, 400, "invalid_request_error", "force: Extra inputs are not permitted")
    for empty in (b"", b"{}", b"null"):
        answer = await raw.post(f"/v1/agents/{agent.id}/archive", content=empty, headers=served.headers())
        assert answer.status_code == (400 if empty == b"null" else 200)


BAD_QUERIES = [
    ("limit: Input should be greater than or equal to 1", "limit=0"),
    ("limit: Input should be less than or equal to 100", "limit=101"),
    ("limit: Input should be a valid integer", "limit=many"),
    ("limit: given more than once", "limit=1&limit=2"),
    ("color: Extra inputs are not permitted", "color=red"),
    ("page: invalid page cursor", "page=page_nonsense"),
    ("page: invalid page cursor", "page="),
    ("include_archived: Input should be `true` or `false`", "include_archived=maybe"),
    ("created_at[gte]: Input should be an RFC 3339 timestamp", "created_at[gte]=yesterday"),
    ("created_at[lte]: Input should be an RFC 3339 timestamp", "created_at%5Blte%5D=2026-13-01T00:00:00Z"),
    ("created_at[lte]: Input should be an RFC 3339 timestamp", "created_at[lte]=2026-01-01"),
    ("page: text must not contain NUL", "page=%00"),
    ("query: malformed", "page=%ff"),
]


@pytest.mark.requirement("CNV-023", "CNV-038", "CNV-063")
@pytest.mark.parametrize(("message", "query"), BAD_QUERIES)
async def test_bad_queries_name_the_parameter(raw: httpx.AsyncClient, served: Served, message: str, query: str) -> None:
    answer = await raw.get(f"/v1/agents?{query}", headers=served.headers())
    expected = message.removeprefix("page: ") if "cursor" in message else message
    refused(answer, 400, "invalid_request_error", expected)


@pytest.mark.requirement("CNV-002", "CNV-042", "OBS-035")
async def test_beta_in_the_query_is_ignored_and_other_lists_cursors_are_not_taken(
    client: AsyncAnthropic, raw: httpx.AsyncClient, served: Served
) -> None:
    for index in range(2):
        await client.beta.environments.create(name=f"e{index}")
    first = await raw.get("/v1/environments?beta=true&limit=1", headers=served.headers())
    cursor = first.json()["next_page"]
    assert cursor.startswith("page_")
    answer = await raw.get("/v1/agents", params={"page": cursor}, headers=served.headers())
    refused(answer, 400, "invalid_request_error", "invalid page cursor")
    last = await raw.get("/v1/environments", params={"page": cursor}, headers=served.headers())
    assert "next_page" not in last.json()


@pytest.mark.requirement("CNV-034")
async def test_a_body_above_the_bound_is_refused_however_it_is_sent(raw: httpx.AsyncClient, served: Served) -> None:
    block = b" " * (1024 * 1024)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(33):
            yield block

    for content in (block * 33, endless()):
        answer = await raw.post("/v1/agents", content=content, headers=served.headers())
        refused(answer, 413, "request_too_large", "Request exceeds the maximum size of 32 MB")


@pytest.mark.requirement("AGT-024", "CNV-033", "CNV-060", "CNV-061")
async def test_nothing_of_the_framework_shows(raw: httpx.AsyncClient, served: Served) -> None:
    headers = served.headers()
    refused(await raw.put("/v1/agents", headers=headers), 405, "invalid_request_error", "method not allowed")
    refused(await raw.delete("/v1/agents/agent_x", headers=headers), 405, "invalid_request_error", "method")
    for path in (
        "/",
        "/docs/",
        "/docs/nothing.js",
        "/redoc",
        "/v1/agents/",
        "/v1/agents/a/b/c",
        "/v1/agents/%2e",
    ):
        answer = await raw.get(path, headers=headers)
        refused(answer, 404, "not_found_error", "")
    compressed = headers | {"content-encoding": "gzip"}
    answer = await raw.post("/v1/agents", content=b"x", headers=compressed)
    refused(answer, 400, "invalid_request_error", "content-encoding: ")


@pytest.mark.requirement("CNV-035")
async def test_a_bug_is_a_bare_500(raw: httpx.AsyncClient, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with served.services.db.transaction() as tx:
        await tx.execute(text("DROP TABLE agent_versions"))
    answer = await raw.get("/v1/agents", headers=served.headers())
    refused(answer, 500, "api_error", "Internal server error")
    assert "agent_versions" not in answer.text
    assert any("agent_versions" in (record.exc_text or str(record.exc_info)) for record in caplog.records)


async def test_health_and_metrics(raw: httpx.AsyncClient, served: Served) -> None:
    assert (await raw.get("/healthz")).status_code == 200
    assert (await raw.get("/readyz")).json() == {"status": "ready"}
    await raw.get("/v1/agents/agent_x", headers=served.headers())
    exposed = bytes(health.metrics_response().body).decode()
    assert 'route="/v1/agents/{agent_id}"' in exposed
    assert "agent_x" not in exposed
    async with served.services.db.transaction() as tx:
        await tx.execute(text("DROP TABLE alembic_version"))
    answer = await raw.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "unready")


@pytest.mark.requirement("CNV-026")
async def test_keys_are_cached_and_revoked(raw: httpx.AsyncClient, served: Served) -> None:
    services: Services = served.services
    directory = services.keys
    assert isinstance(directory, keys.KeyDirectory)
    made = await keys.create(services.db, HMAC_KEY, workspace_id=served.caller.workspace_id, name="k")
    headers = served.headers() | {"x-api-key": made.secret.get_secret_value()}
    assert (await raw.get("/v1/agents", headers=headers)).status_code == 200
    revoked = await keys.revoke(services.db, made.key.id)
    assert revoked.revoked_at is not None
    assert revoked.last_used_at is not None
    directory.forget()
    refused(await raw.get("/v1/agents", headers=headers), 401, "authentication_error", "")
