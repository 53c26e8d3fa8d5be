"""Walks every route of the application with ids of another workspace: they are as good as ids that do not exist.

Generated from the routers: a new route is walked as soon as it is there, and the test fails until it knows how to fill the
route's ids and what body its checks let through.
"""

import re
from itertools import pairwise
from typing import Any

import pytest
from fastapi.routing import APIRoute

from managed_agents.api.app import ROUTERS
from managed_agents.web.actor import Scope
from tests.support.server import Caller, make_caller, sdk
from tests.support.stack import Stack, message
from tests.support.statements import noted

pytestmark = pytest.mark.anyio

IDS = {
    "agent_id": "agent_01unknown",
    "environment_id": "env_01unknown",
    "file_id": "file_01unknown",
    "key_id": "ekey_01unknown",
    "resource_id": "sesrsc_01unknown",
    "session_id": "sesn_01unknown",
    "thread_id": "sthr_01unknown",
}
# The smallest body that is taken, for routes that do not take an empty one.
BODIES: dict[str, Any] = {
    "POST /v1/agents/{agent_id}": {"name": "mine now"},
    "POST /v1/environments/{environment_id}": {"description": "mine now"},
    "POST /v1/environments/{environment_id}/keys": {"name": "mine now"},
    "POST /v1/sessions/{session_id}": {"title": "mine now"},
    "POST /v1/sessions/{session_id}/events": {"events": [message("mine now")]},
    "POST /v1/sessions/{session_id}/resources": {"type": "file", "file_id": "file_01unknown"},
    "POST /v1/sessions/{session_id}/resources/{resource_id}": {"authorization_token": "mine-now"},
}
ROUTES = sorted(
    f"{method} {route.path}"
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    and route.path.startswith("/v1/")
    and "{" in route.path
    # An administrator of the organization sees all of its workspaces.
    and not route.path.startswith("/v1/organizations/")
    for method in route.methods
)


@pytest.fixture(scope="module")
async def stranger(server: Stack) -> Caller:
    """An administrator of another workspace: it may do everything there."""
    return await make_caller(server.db, "elsewhere", Scope.ADMIN)


def about_the_object(statement: str) -> bool:
    """Not about the asker: its key (cached for a while), its workspace."""
    return "api_keys" not in statement and "FROM workspaces" not in statement


@pytest.fixture(scope="module")
async def foreign(server: Stack) -> dict[str, str]:
    """One object of every kind, all of one workspace."""
    agent, file = await server.agent(), await server.upload()
    create = server.client.beta.sessions.create
    session = await create(agent=agent.id, environment_id=server.environment_id, resources=[{"type": "file", "file_id": file.id}])
    (thread,) = [thread async for thread in server.client.beta.sessions.threads.list(session.id)]
    return {
        "agent_id": agent.id,
        "environment_id": server.environment_id,
        "file_id": file.id,
        "key_id": IDS["key_id"],  # below an environment, which is looked for first
        "resource_id": session.resources[0].id,
        "session_id": session.id,
        "thread_id": thread.id,
    }


async def asked(server: Stack, route: str, filled: dict[str, str], **headers: str) -> tuple[dict[str, Any], list[str]]:
    """Call the route; returns the error and the statements."""
    method, path = route.format(**filled).split()
    options = {"json": BODIES[route]} if route in BODIES else {}
    with noted(server.db) as seen:
        answer = await server.raw(method, path, headers=server.headers(**headers), **options)
    assert answer.status_code == 404, f"{route}: {answer.status_code} {answer.text}"
    return answer.json()["error"], [statement for statement in seen if about_the_object(statement)]


@pytest.mark.requirement("CNV-067")
@pytest.mark.parametrize("route", ROUTES)
async def test_ids_of_another_workspace_are_ids_of_nothing(
    server: Stack, foreign: dict[str, str], stranger: Caller, route: str
) -> None:
    names = re.findall(r"{(\w+)}", route)
    hidden, found_by = await asked(server, route, foreign, x_api_key=stranger.secret)
    nothing, looked_for_by = await asked(server, route, IDS, x_api_key=stranger.secret)
    for name in names:
        hidden["message"] = hidden["message"].replace(foreign[name], IDS[name])
    assert hidden == nothing
    # The very query that would find it, and no other: what exists elsewhere costs neither more nor less.
    assert found_by == looked_for_by
    assert len(found_by) == 1


@pytest.mark.requirement("CNV-067")
@pytest.mark.parametrize("route", [route for route in ROUTES if "/sessions/{" in route and route.count("{") > 1])
async def test_ids_of_another_workspace_below_an_own_object(
    server: Stack, foreign: dict[str, str], stranger: Caller, route: str
) -> None:
    """Also in an own session, and there also for the objects of another own session."""
    async with sdk(server.base_url, stranger) as client:
        agent = await client.beta.agents.create(name="own", model="claude-opus-5")
        environment = await client.beta.environments.create(name=f"own {route}")
        own = await client.beta.sessions.create(agent=agent.id, environment_id=environment.id)
    below = re.findall(r"{(\w+)}", route)[1:]
    said: list[tuple[dict[str, Any], list[str]]] = []
    for filled in (foreign, IDS):
        error, seen = await asked(server, route, {**filled, "session_id": own.id}, x_api_key=stranger.secret)
        for name in below:
            error["message"] = error["message"].replace(filled[name], name)
        said.append((error, seen))
    assert all(first == second for first, second in pairwise(said))
    other = await server.client.beta.sessions.create(agent=foreign["agent_id"], environment_id=server.environment_id)
    error, _ = await asked(server, route, {**foreign, "session_id": other.id})
    for name in below:
        error["message"] = error["message"].replace(foreign[name], name)
    assert error == said[0][0]


@pytest.mark.requirement("CNV-067")
async def test_nothing_was_touched(server: Stack, foreign: dict[str, str], stranger: Caller) -> None:
    before = {name: (await server.raw("GET", path)).json() for name, path in _reads(foreign).items()}
    for route in ROUTES:
        await asked(server, route, foreign, x_api_key=stranger.secret)
    after = {name: (await server.raw("GET", path)).json() for name, path in _reads(foreign).items()}
    for found in (before, after):
        found["session"].pop("stats")
    assert after == before


def _reads(filled: dict[str, str]) -> dict[str, str]:
    return {
        "agent": "/v1/agents/{agent_id}".format(**filled),
        "environment": "/v1/environments/{environment_id}".format(**filled),
        "session": "/v1/sessions/{session_id}".format(**filled),
        "file": "/v1/files/{file_id}".format(**filled),
    }
