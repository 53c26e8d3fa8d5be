"""An environment key serves the sessions of its environment, and does nothing else."""

import anthropic
import anyio
import httpx
import pytest

from managed_agents.api.app import ROUTERS
from managed_agents.resources.keys import service as keys
from tests.support.server import HMAC_KEY, Caller, sdk
from tests.support.stack import Stack, message
from tests.support.watch import WAIT_SECONDS

pytestmark = pytest.mark.anyio

ALLOWED = {
    ("GET", "/v1/sessions/{session_id}"),
    ("GET", "/v1/sessions/{session_id}/events"),
    ("GET", "/v1/sessions/{session_id}/events/stream"),
    ("POST", "/v1/sessions/{session_id}/events"),
}


async def environment_key(server: Stack, environment_id: str | None = None) -> Caller:
    made = await keys.create_for_environment(
        server.db, HMAC_KEY, server.caller.workspace_id, environment_id or server.environment_id, name="worker"
    )
    assert made.secret.get_secret_value().startswith("sk-ma-env-")
    return Caller(server.caller.workspace_id, made.secret.get_secret_value())


@pytest.mark.requirement("ORG-010")
async def test_a_worker_follows_and_answers_its_sessions(server: Stack) -> None:
    session = await server.session(["hello"])
    async with sdk(server.base_url, await environment_key(server)) as worker:
        sessions = worker.beta.sessions
        assert (await sessions.retrieve(session.id)).id == session.id
        await sessions.events.send(session.id, events=[message("go")])
        await server.idle(session)
        assert "agent.message" in [event.type async for event in sessions.events.list(session.id)]
        async with await sessions.events.stream(session.id) as stream:
            assert stream.response.status_code == 200


@pytest.mark.requirement("ORG-010")
async def test_sessions_of_other_environments_do_not_exist_for_it(server: Stack) -> None:
    session = await server.session()
    elsewhere = await server.client.beta.environments.create(name="elsewhere", config={"type": "cloud"})
    headers = server.headers(x_api_key=(await environment_key(server, elsewhere.id)).secret)
    for method, path in sorted(ALLOWED):
        body = {"json": {"events": [message("x")]}} if method == "POST" else {}
        said = await server.refused(method, path.format(session_id=session.id), status=404, headers=headers, **body)
        unknown = await server.refused(method, path.format(session_id="sesn_01nobody"), status=404, headers=headers, **body)
        assert said.replace(session.id, "sesn_01nobody") == unknown
    await server.refused("GET", "/v1/sessions/%00", status=404, headers=headers)


@pytest.mark.requirement("ORG-011")
async def test_every_other_route_refuses_it(server: Stack) -> None:
    headers = server.headers(x_api_key=(await environment_key(server)).secret)
    headers["anthropic-beta"] = "managed-agents-2026-04-01"
    refused: list[str] = []
    for router in ROUTERS:
        for route in router.routes:
            for method in sorted(getattr(route, "methods", ())):
                path: str = getattr(route, "path", "")
                if not path.startswith("/v1/") or (method, path) in ALLOWED:
                    continue
                answer = await server.http.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                assert answer.status_code == 403, (method, path, answer.text)
                error = answer.json()["error"]
                assert error["type"] == "permission_error"
                assert error["details"] == {"error_code": "api_key_scope_missing"}
                refused.append(path)
    assert len(refused) > 30


async def test_environment_keys_over_the_api(server: Stack) -> None:
    admin = await keys.create(server.db, HMAC_KEY, workspace_id=server.caller.workspace_id, name="admin", scope=keys.Scope.ADMIN)
    headers = server.headers(x_api_key=admin.secret.get_secret_value())
    environment = await server.client.beta.environments.create(name="keyed", config={"type": "cloud"})
    path = f"/v1/environments/{environment.id}/keys"

    async def call(method: str, path: str, **options: object) -> httpx.Response:
        answer = await server.raw(method, path, headers=headers, **options)
        assert answer.status_code == 200, answer.text
        return answer

    made = (await call("POST", path, json={"name": "one"})).json()
    secret = made.pop("secret")
    assert (made["type"], made["environment_id"], made["status"]) == ("environment_key", environment.id, "active")
    second = (await call("POST", path, json={"name": "two", "expires_at": "2099-01-01T00:00:00Z"})).json()
    listed = (await call("GET", path)).json()
    assert [key["name"] for key in listed["data"]] == ["two", "one"]
    assert secret not in str(listed)
    page = (await call("GET", f"{path}?limit=1&after_id={second['id']}")).json()
    assert [key["id"] for key in page["data"]] == [made["id"]]
    archived = (await call("POST", f"{path}/{made['id']}/archive")).json()
    assert archived["status"] == "archived"
    assert (await call("POST", f"{path}/{made['id']}/archive")).json() == archived
    # Environment keys and API keys do not mix.
    assert made["id"] not in (await call("GET", "/v1/organizations/api_keys")).text
    await server.refused("GET", f"/v1/organizations/api_keys/{made['id']}", status=404, headers=headers)
    await server.refused("POST", f"{path}/{admin.key.id}/archive", status=404, headers=headers)
    await server.refused("POST", path, status=403, json={"name": "x"})  # a developer's key
    # Of another workspace, none of it is there.
    theirs = await keys.create(server.db, HMAC_KEY, workspace_id=server.other.workspace_id, name="a", scope=keys.Scope.ADMIN)
    foreign = server.headers(x_api_key=theirs.secret.get_secret_value())
    for method, where, body in (
        ("POST", path, {"json": {"name": "x"}}),
        ("GET", path, {}),
        ("POST", f"{path}/{second['id']}/archive", {}),
    ):
        said = await server.refused(method, where, status=404, headers=foreign, **body)
        assert said == "Environment not found."
    # They go with their environment.
    await server.client.beta.environments.delete(environment.id)
    answer = await server.raw("GET", "/v1/sessions/sesn_01x", headers=server.headers(x_api_key=secret))
    assert answer.status_code == 401
    archived_one = await server.client.beta.environments.create(name="keyed", config={"type": "cloud"})
    await server.client.beta.environments.archive(archived_one.id)
    said = await server.refused(
        "POST", f"/v1/environments/{archived_one.id}/keys", status=400, headers=headers, json={"name": "x"}
    )
    assert "archived" in said


@pytest.mark.requirement("ORG-004")
async def test_a_revoked_key_ends_its_streams_too(server: Stack) -> None:
    session = await server.session()
    made = await keys.create(server.db, HMAC_KEY, workspace_id=server.caller.workspace_id, name="watcher")
    caller = Caller(server.caller.workspace_id, made.secret.get_secret_value())
    async with sdk(server.base_url, caller) as watcher, server.watching(session) as unharmed:
        async with await watcher.beta.sessions.events.stream(session.id) as stream:
            await keys.revoke(server.db, made.key.id)
            with anyio.fail_after(WAIT_SECONDS), pytest.raises(anthropic.APIStatusError, match="Authentication failed"):
                assert [event async for event in stream] == []
        with pytest.raises(anthropic.AuthenticationError):
            await watcher.beta.sessions.retrieve(session.id)
        assert not unharmed.ended
