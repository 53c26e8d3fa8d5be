"""The organisation, its workspaces, keys and limits, through the official SDK with strict validation."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic

from managed_agents.core.ids import WorkspaceId
from managed_agents.resources.keys import service as keys
from managed_agents.resources.organizations import service as organizations
from managed_agents.web.actor import Scope
from tests.support.server import FIRST_KEY, HMAC_KEY, Caller, sdk

from .conftest import Served
from .test_edge import refused

pytestmark = pytest.mark.anyio


@pytest.fixture
async def owner(served: Served) -> AsyncIterator[AsyncAnthropic]:
    """The organisation's administrator: the first key."""
    default = await organizations.default_workspace(served.services.db)
    async with sdk(served.base_url, Caller(default.id, FIRST_KEY)) as made:
        yield made


async def key_of(served: Served, scope: Scope, workspace_id: str | None = None) -> Caller:
    workspace = WorkspaceId(workspace_id or served.caller.workspace_id)
    made = await keys.create(served.services.db, HMAC_KEY, workspace_id=workspace, name=scope.name, scope=scope)
    return Caller(workspace, made.secret.get_secret_value())


async def create_key(client: AsyncAnthropic, **fields: Any) -> Any:
    return await client.post("/v1/organizations/api_keys", body=fields, cast_to=object)


@pytest.mark.requirement("ORG-012")
async def test_the_organization(owner: AsyncAnthropic, client: AsyncAnthropic) -> None:
    me = await owner.organization.retrieve()
    assert (me.type, me.name) == ("organization", "default")
    assert await client.organization.retrieve() == me
    answer = await client.organization.with_raw_response.retrieve()
    assert answer.headers["anthropic-organization-id"] == me.id


@pytest.mark.requirement("ORG-008", "ORG-004")
async def test_workspaces_live_and_are_archived(owner: AsyncAnthropic, served: Served, raw: httpx.AsyncClient) -> None:
    workspaces = owner.organization.workspaces
    made = await workspaces.create(name="research", display_color="#00ff00", tags={"team": "r", "cost": "7"})
    assert (made.name, made.display_color, made.tags) == ("research", "#00ff00", {"team": "r", "cost": "7"})
    assert made.archived_at is None
    assert made.data_residency.workspace_geo == "us"
    assert made.compartment_id.startswith("cmpt_")
    assert await workspaces.retrieve(made.id) == made
    updated = await workspaces.update(made.id, name="science", tags={"team": None, "new": "1"})
    assert (updated.name, updated.tags, updated.compartment_id) == ("science", {"cost": "7", "new": "1"}, made.compartment_id)
    with pytest.raises(anthropic.ConflictError):
        await workspaces.create(name="science")
    secret = await key_of(served, Scope.ADMIN, made.id)
    headers = served.headers(x_api_key=secret.secret)
    assert (await raw.get("/v1/agents", headers=headers)).status_code == 200
    archived = await workspaces.archive(made.id)
    assert archived.archived_at is not None
    assert await workspaces.archive(made.id) == archived
    refused(await raw.get("/v1/agents", headers=headers), 401, "authentication_error", "Authentication failed")
    assert [key.status async for key in owner.organization.api_keys.list(workspace_id=made.id)] == ["archived"]
    with pytest.raises(anthropic.BadRequestError, match="archived"):
        await workspaces.update(made.id, name="again")
    with pytest.raises(anthropic.BadRequestError, match="archived"):
        await create_key(owner, name="k", workspace_id=made.id)
    again = await workspaces.create(name="science")  # the name is free again
    assert again.id != made.id
    listed = [workspace.id async for workspace in workspaces.list(ids=[made.id, again.id, "wrkspc_01nobody"])]
    assert listed == [again.id]
    everything = [workspace async for workspace in workspaces.list(limit=1, include_archived=True, include_default=True)]
    assert [workspace.name for workspace in everything] == ["science", "science", "theirs", "mine", "default"]
    with pytest.raises(anthropic.BadRequestError, match="default workspace"):
        await workspaces.archive(everything[-1].id)


@pytest.mark.requirement("ORG-008")
async def test_pages_go_both_ways(owner: AsyncAnthropic) -> None:
    workspaces = owner.organization.workspaces
    made = [(await workspaces.create(name=f"w{index}")).id for index in range(5)]
    newest_first = made[::-1]
    page = await workspaces.list(limit=2)
    assert [workspace.id for workspace in page.data] == newest_first[:2]
    assert (page.has_more, page.first_id, page.last_id) == (True, newest_first[0], newest_first[1])
    page = await workspaces.list(limit=2, after_id=newest_first[1])
    assert [workspace.id for workspace in page.data] == newest_first[2:4]
    page = await workspaces.list(limit=2, before_id=newest_first[3])
    assert [workspace.id for workspace in page.data] == newest_first[1:3]
    assert page.has_more
    for cursors in ({"after_id": "wrkspc_01nobody"}, {"after_id": made[0], "before_id": made[1]}):
        with pytest.raises(anthropic.BadRequestError):
            await workspaces.list(**cursors)


@pytest.mark.requirement("ORG-902")
async def test_what_a_workspace_cannot_have_is_refused_by_name(raw: httpx.AsyncClient, served: Served) -> None:
    headers = served.headers(x_api_key=FIRST_KEY)
    for message, fields in (
        ("external_key_id: is not served", {"external_key_id": "ek_1"}),
        ("user_profile_id: is not served", {"user_profile_id": "uprof_1"}),
        ("data_residency.default_inference_geo: only 'global'", {"data_residency": {"default_inference_geo": "us"}}),
        ("data_residency.color: Extra inputs", {"data_residency": {"color": "us"}}),
        ("display_color: String should match", {"display_color": "red"}),
        ("tags.anthropic-x: keys must not begin", {"tags": {"anthropic-x": "1"}}),
        ("tags: at most 16", {"tags": {str(index): "" for index in range(17)}}),
        ("color: Extra inputs are not permitted", {"color": "red"}),
    ):
        answer = await raw.post("/v1/organizations/workspaces", json={"name": "w", **fields}, headers=headers)
        refused(answer, 400, "invalid_request_error", message)
    accepted = {"data_residency": {"default_inference_geo": "global", "allowed_inference_geos": None}, "tags": None}
    answer = await raw.post("/v1/organizations/workspaces", json={"name": "w", **accepted}, headers=headers)
    assert answer.status_code == 200


@pytest.mark.requirement("ORG-001", "ORG-002", "ORG-903")
async def test_a_key_is_shown_once_and_lives_until_revoked(owner: AsyncAnthropic, served: Served, raw: httpx.AsyncClient) -> None:
    made = await create_key(owner, name="ci", workspace_id=served.caller.workspace_id, access_scope="viewer")
    secret = made.pop("secret")
    listed = owner.organization.api_keys
    assert (await raw.get("/v1/agents", headers=served.headers(x_api_key=secret))).status_code == 200
    key = await listed.retrieve(made["id"])
    assert key.status == "active"
    assert key.scope.type == "workspace"
    assert key.scope.workspace_id == served.caller.workspace_id
    assert key.partial_key_hint == f"...{secret[-4:]}"
    assert secret not in key.to_json()
    assert key.to_dict()["access_scope"] == "viewer"
    assert key.to_dict()["last_used_at"] is not None
    answer = await raw.post("/v1/agents", json={"name": "a", "model": "m"}, headers=served.headers(x_api_key=secret))
    refused(answer, 403, "permission_error", "This API key lacks the scope `developer`")
    assert answer.json()["error"]["details"] == {"error_code": "api_key_scope_missing"}

    async def status_after(**change: Any) -> int:
        await listed.update(made["id"], **change)
        return (await raw.get("/v1/agents", headers=served.headers(x_api_key=secret))).status_code

    assert await status_after(name="renamed") == 200
    assert await status_after(status="inactive") == 401
    assert [found.name async for found in listed.list(status="inactive")] == ["renamed"]
    assert await status_after(status="active") == 200
    assert await status_after(status="archived") == 401
    assert await status_after(status="archived") == 401
    with pytest.raises(anthropic.BadRequestError, match="Cannot modify archived API key"):
        await listed.update(made["id"], status="active")
    assert [found.id async for found in listed.list(created_by_user_id="user_1")] == []
    assert [found.id async for found in listed.list(status="archived", limit=1)] == [made["id"]]


@pytest.mark.requirement("ORG-006")
async def test_a_key_expires(owner: AsyncAnthropic, served: Served, raw: httpx.AsyncClient) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    made = await create_key(owner, name="brief", expires_at=soon.isoformat())
    headers = served.headers(x_api_key=made["secret"])
    answer = await raw.get("/v1/organizations/me", headers=headers)
    assert answer.status_code == 200
    async with served.services.db.transaction() as tx:
        await tx.exec_driver_sql("UPDATE api_keys SET expires_at = now() WHERE name = 'brief'")
    served.services.keys.forget([made["id"]])  # changed behind its back
    refused(await raw.get("/v1/organizations/me", headers=headers), 401, "authentication_error", "")
    assert [key.status async for key in owner.organization.api_keys.list(status="expired")] == ["expired"]
    with pytest.raises(anthropic.BadRequestError, match="expires_at: must be in the future"):
        await create_key(owner, name="past", expires_at="2020-01-01T00:00:00Z")


async def test_the_answer_with_a_secret_is_not_to_be_stored(raw: httpx.AsyncClient, served: Served) -> None:
    answer = await raw.post("/v1/organizations/api_keys", json={"name": "k"}, headers=served.headers(x_api_key=FIRST_KEY))
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["secret"].startswith("sk-ma-")


@pytest.mark.requirement("ORG-002")
async def test_a_secret_is_not_kept_for_a_repeated_request(raw: httpx.AsyncClient, served: Served) -> None:
    headers = served.headers(x_api_key=FIRST_KEY, idempotency_key="once")
    first = await raw.post("/v1/organizations/api_keys", json={"name": "k"}, headers=headers)
    assert first.status_code == 200
    again = await raw.post("/v1/organizations/api_keys", json={"name": "k"}, headers=headers)
    refused(again, 409, "conflict_error", "idempotency-key: the request was done, and its answer held a secret")
    assert first.json()["secret"] not in again.text
    assert len(await keys.list_keys(served.services.db)) == 4  # the first, mine, theirs and this one


@pytest.mark.requirement("ORG-009")
async def test_one_workspaces_administrator_keeps_to_it(served: Served, owner: AsyncAnthropic, raw: httpx.AsyncClient) -> None:
    theirs = await keys.list_keys(served.services.db, workspace_id=served.stranger.workspace_id)
    async with sdk(served.base_url, await key_of(served, Scope.ADMIN)) as admin:
        organization = admin.organization
        assert [workspace.id async for workspace in organization.workspaces.list(include_default=True)] == [
            served.caller.workspace_id
        ]
        assert {key.scope.workspace_id async for key in organization.api_keys.list()} == {served.caller.workspace_id}  # type: ignore[union-attr]
        for call in (
            lambda: organization.workspaces.retrieve(served.stranger.workspace_id),
            lambda: organization.workspaces.update(served.stranger.workspace_id, name="x"),
            lambda: organization.workspaces.archive(served.stranger.workspace_id),
            lambda: organization.workspaces.rate_limits.list(served.stranger.workspace_id),
            lambda: organization.workspaces.rate_limits.update("rl_01x", workspace_id=served.stranger.workspace_id, limits=[]),
            lambda: organization.api_keys.retrieve(theirs[0].id),
            lambda: organization.api_keys.update(theirs[0].id, status="archived"),
            lambda: create_key(admin, name="k", workspace_id=served.stranger.workspace_id),
        ):
            with pytest.raises(anthropic.NotFoundError):
                await call()
        for call in (
            lambda: organization.workspaces.create(name="mine too"),
            lambda: organization.workspaces.archive(served.caller.workspace_id),
        ):
            with pytest.raises(anthropic.PermissionDeniedError) as refusal:
                await call()
            assert refusal.value.body["error"]["details"]["error_code"] == "api_key_scope_missing"  # type: ignore[index]
        assert (await create_key(admin, name="k"))["scope"]["workspace_id"] == served.caller.workspace_id


@pytest.mark.requirement("ORG-003")
@pytest.mark.parametrize("scope", [Scope.VIEWER, Scope.DEVELOPER])
async def test_only_administrators_administer(served: Served, raw: httpx.AsyncClient, scope: Scope) -> None:
    caller = await key_of(served, scope)
    headers = served.headers(without="anthropic-beta", x_api_key=caller.secret)
    for method, path in (
        ("POST", "/v1/organizations/workspaces"),
        ("GET", "/v1/organizations/workspaces"),
        ("GET", "/v1/organizations/workspaces/wrkspc_01x"),
        ("POST", "/v1/organizations/workspaces/wrkspc_01x"),
        ("POST", "/v1/organizations/workspaces/wrkspc_01x/archive"),
        ("GET", "/v1/organizations/workspaces/wrkspc_01x/rate_limits"),
        ("POST", "/v1/organizations/workspaces/wrkspc_01x/rate_limits/rl_01x"),
        ("POST", "/v1/organizations/api_keys"),
        ("GET", "/v1/organizations/api_keys"),
        ("GET", "/v1/organizations/api_keys/apikey_01x"),
        ("POST", "/v1/organizations/api_keys/apikey_01x"),
    ):
        answer = await raw.request(method, path, content=b"{" if method == "POST" else None, headers=headers)
        refused(answer, 403, "permission_error", "This API key lacks the scope `admin`")
    for path in ("/v1/organizations/me", "/v1/organizations/rate_limits"):
        assert (await raw.get(path, headers=headers)).status_code == 200


async def test_unknown_and_unstorable_ids_are_404(raw: httpx.AsyncClient, served: Served) -> None:
    headers = served.headers(x_api_key=FIRST_KEY)
    for id_ in ("nonsense", "wrkspc_01x", "apikey_01x", "%00", "a%00b", "x" * 5000):
        for path in (f"api_keys/{id_}", f"workspaces/{id_}", f"workspaces/{id_}/rate_limits"):
            refused(await raw.get(f"/v1/organizations/{path}", headers=headers), 404, "not_found_error", "")
        for path in (f"/v1/environments/{id_}/keys", f"/v1/environments/env_01x/keys/{id_}/archive"):
            method = "POST" if path.endswith("archive") else "GET"
            refused(await raw.request(method, path, headers=headers), 404, "not_found_error", "")


@pytest.mark.requirement("ORG-007")
async def test_an_organizations_administrator_acts_in_the_workspace_it_names(
    served: Served, owner: AsyncAnthropic, raw: httpx.AsyncClient
) -> None:
    made = await owner.beta.agents.create(
        name="for them", model="m", extra_headers={"anthropic-workspace-id": served.caller.workspace_id}
    )
    answer = await raw.get(f"/v1/agents/{made.id}", headers=served.headers())
    assert answer.status_code == 200
    refused(await raw.get(f"/v1/agents/{made.id}", headers=served.headers(x_api_key=FIRST_KEY)), 404, "not_found_error", "")
    for workspace_id in ("wrkspc_01nobody", "nonsense", ""):
        headers = served.headers(x_api_key=FIRST_KEY, anthropic_workspace_id=workspace_id)
        refused(await raw.get("/v1/agents", headers=headers), 403, "permission_error", "anthropic-workspace-id: ")
    named = served.headers(x_api_key=FIRST_KEY, anthropic_workspace_id=served.caller.workspace_id)
    answer = await raw.get("/v1/agents", headers=named)
    assert answer.headers["anthropic-workspace-id"] == served.caller.workspace_id
    await owner.organization.workspaces.archive(served.caller.workspace_id)
    refused(await raw.get("/v1/agents", headers=named), 403, "permission_error", "anthropic-workspace-id: ")
    # An administrator of one workspace has only that one.
    admin = await key_of(served, Scope.ADMIN, served.stranger.workspace_id)
    default = (await organizations.default_workspace(served.services.db)).id
    headers = served.headers(x_api_key=admin.secret, anthropic_workspace_id=default)
    refused(await raw.get("/v1/agents", headers=headers), 403, "permission_error", "anthropic-workspace-id: ")


@pytest.mark.requirement("ORG-023", "ORG-901")
async def test_rate_limits_are_listed_and_overridden(owner: AsyncAnthropic, served: Served) -> None:
    listed = [entry async for entry in owner.organization.rate_limits.list()]
    assert [(entry.limits[0].type, entry.limits[0].value) for entry in listed] == [
        ("requests_per_minute", 300),
        ("requests_per_minute", 1200),
    ]
    assert [entry.id async for entry in owner.organization.rate_limits.list(limit=1)] == [entry.id for entry in listed]
    assert [entry async for entry in owner.organization.rate_limits.list(group_type="batch")] == []
    with pytest.raises(anthropic.NotFoundError):
        await owner.organization.rate_limits.list(model="claude-opus-4-8")
    mine = served.caller.workspace_id
    overrides = owner.organization.workspaces.rate_limits
    assert [entry async for entry in overrides.list(mine)] == []
    inherited = [entry async for entry in overrides.list(mine, include_inherited=True)]
    assert [(entry.limits[0].value, entry.limits[0].source.type) for entry in inherited] == [
        (300, "organization"),
        (1200, "organization"),
    ]
    assert [entry.rate_limit_id for entry in inherited] == [entry.id for entry in listed]
    made = await overrides.update(listed[0].id, workspace_id=mine, limits=[{"type": "requests_per_minute", "value": 5}])
    (limit,) = made.limits
    assert (limit.value, limit.org_limit, limit.source.type) == (5, 300, "workspace")
    assert [entry async for entry in overrides.list(mine)] == [made]
    unchanged = await overrides.update(listed[0].id, workspace_id=mine, limits=[])
    assert unchanged == made
    cleared = await overrides.update(listed[0].id, workspace_id=mine, limits=[{"type": "requests_per_minute", "value": None}])
    assert cleared.limits == []
    assert [entry async for entry in overrides.list(mine)] == []
    for rate_limit_id, limits, error in (
        ("rl_01nobody", [], anthropic.NotFoundError),
        (listed[0].id, [{"type": "tokens_per_day", "value": 5}], anthropic.BadRequestError),
        (listed[0].id, [{"type": "requests_per_minute", "value": -1}], anthropic.BadRequestError),
    ):
        with pytest.raises(error):
            await overrides.update(rate_limit_id, workspace_id=mine, limits=limits)  # type: ignore[arg-type]
    async with sdk(served.base_url, await key_of(served, Scope.ADMIN)) as admin:
        with pytest.raises(anthropic.PermissionDeniedError):
            await admin.organization.workspaces.rate_limits.update(
                listed[0].id, workspace_id=mine, limits=[{"type": "requests_per_minute", "value": 9000}]
            )
