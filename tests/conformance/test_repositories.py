"""GitHub repositories as resources of sessions: what the API takes, keeps and shows."""

from typing import Any

import anthropic
import pytest
from sqlalchemy import text

from managed_agents.resources.sessions import repositories
from tests.support.stack import Stack, sealer

pytestmark = pytest.mark.anyio

URL = "https://github.com/acme/widgets"
TOKEN = "ghp_ThisIsTheSecretOfTheTest"
REPOSITORY: dict[str, Any] = {"type": "github_repository", "url": URL}
SHA = "0123456789abcdef" * 2 + "01234567"


async def token_of(server: Stack, session: Any, resource: Any) -> str | None:
    async with server.db.transaction() as tx:
        found = await repositories.token(tx, session.id, resource.id, sealing=sealer(server.settings))
    return None if found is None else found.get_secret_value()


@pytest.mark.requirement("SES-090")
async def test_repositories_are_shown_without_their_tokens(server: Stack) -> None:
    wanted: list[Any] = [
        {**REPOSITORY, "authorization_token": TOKEN},
        {**REPOSITORY, "mount_path": "/workspace/at/main", "checkout": {"type": "branch", "name": "feature/x"}},
        {**REPOSITORY, "mount_path": "/home/agent/old", "checkout": {"type": "commit", "sha": SHA}},
    ]
    session = await server.session(resources=wanted)
    shown = [resource.to_dict() for resource in session.resources]
    assert [each["mount_path"] for each in shown] == ["/workspace/widgets", "/workspace/at/main", "/home/agent/old"]
    assert [each["checkout"] for each in shown] == [None, *(each["checkout"] for each in wanted[1:])]
    assert set(shown[0]) == {"id", "type", "url", "mount_path", "checkout", "created_at", "updated_at"}
    assert [r.to_dict() async for r in server.client.beta.sessions.resources.list(session.id)] == shown
    assert (await server.client.beta.sessions.resources.retrieve(shown[0]["id"], session_id=session.id)).to_dict() == shown[0]
    assert await token_of(server, session, session.resources[0]) == TOKEN
    assert await token_of(server, session, session.resources[1]) is None


@pytest.mark.requirement("SES-091")
async def test_a_token_is_nowhere_in_the_clear(server: Stack) -> None:
    session = await server.session(resources=[{**REPOSITORY, "authorization_token": TOKEN}])
    resource = session.resources[0]
    rotated = "ghp_another"
    updated = await server.client.beta.sessions.resources.update(resource.id, session_id=session.id, authorization_token=rotated)
    assert updated.id == resource.id
    assert updated.updated_at > resource.updated_at
    assert await token_of(server, session, resource) == rotated
    async with server.db.transaction() as tx:
        tables = (await tx.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))).scalars().all()
        assert "session_resources" in tables
        for table in tables:
            rows = (await tx.execute(text(f"SELECT coalesce(string_agg(t::text, chr(10)), '') FROM \"{table}\" t"))).scalar_one()
            for secret in (TOKEN, rotated, TOKEN.encode().hex(), rotated.encode().hex()):
                assert secret not in rows, table
    path = f"/v1/sessions/{session.id}/resources/{resource.id}"
    for body in ({}, {"authorization_token": None}, {"authorization_token": ""}, {"authorization_token": f"{TOKEN}\n"}):
        assert TOKEN not in await server.refused("POST", path, json=body)
    said = await server.refused("POST", path, json={"authorization_token": TOKEN, "checkout": None})
    assert said.startswith("checkout")
    with pytest.raises(anthropic.BadRequestError, match="stays for the life of its session"):
        await server.client.beta.sessions.resources.delete(resource.id, session_id=session.id)


@pytest.mark.requirement("SES-092", "SES-908")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        *(
            ({"url": url}, "url")
            for url in (
                "https://github.com/acme/widgets.git",
                "https://github.com/acme/widgets/",
                "https://github.com/acme",
                "https://github.com/acme/..",
                "https://github.com/acme/a/b",
                "https://github.com/acme/a?b",
                "https://github.com:443/acme/a",
                "https://user@github.com/acme/a",
                "https://gitlab.com/acme/a",
                "http://github.com/acme/a",
                "git@github.com:acme/a",
                "https://github.com/acme/a\n",
                "",
                None,
            )
        ),
        ({"authorization_token": ""}, "authorization_token"),
        ({"authorization_token": "a b"}, "authorization_token"),
        ({"authorization_token": "x" * 4097}, "authorization_token"),
        ({"authorization_token": 5}, "authorization_token"),
        ({"checkout": {"type": "tag", "name": "v1"}}, "checkout"),
        ({"checkout": {"type": "branch", "name": "--upload-pack=x"}}, "checkout"),
        ({"checkout": {"type": "branch", "name": "a b"}}, "checkout"),
        ({"checkout": {"type": "branch", "name": "a..b"}}, "checkout"),
        ({"checkout": {"type": "commit", "sha": "abcdef0"}}, "checkout"),
        ({"checkout": {"type": "commit", "sha": SHA, "name": "x"}}, "checkout"),
        ({"mount_path": "/etc/x"}, "mount_path"),
        ({"mount_path": "workspace/x"}, "mount_path"),
        ({"mount_path": "/workspace/../etc"}, "mount_path"),
        ({"mount_path": "/home/agent"}, "mount_path"),
        ({"mount_path": ""}, "mount_path"),
        ({"mount_path": "/workspace/" + "x" * 256}, "mount_path"),
        ({"branch": "main"}, "branch"),
    ],
)
async def test_what_is_refused_is_named(server: Stack, fields: dict[str, Any], named: str) -> None:
    agent = await server.agent()
    body = {"agent": agent.id, "environment_id": server.environment_id, "resources": [{**REPOSITORY, **fields}]}
    assert (await server.refused("POST", "/v1/sessions", json=body)).startswith(f"resources.0.{named}")


@pytest.mark.requirement("SES-092", "OBS-033")
async def test_two_resources_never_share_a_path(server: Stack) -> None:
    agent = await server.agent()
    for second in ({}, {"mount_path": "/workspace"}, {"mount_path": "/workspace/widgets/in"}):
        body = {
            "agent": agent.id,
            "environment_id": server.environment_id,
            "resources": [REPOSITORY, {**REPOSITORY, **second}],
        }
        said = await server.refused("POST", "/v1/sessions", json=body)
        assert said == "resources.1.mount_path: overlaps another resource"


@pytest.mark.requirement("SES-065")
async def test_a_living_session_is_given_no_repository(server: Stack) -> None:
    session = await server.session()
    said = await server.refused("POST", f"/v1/sessions/{session.id}/resources", json=REPOSITORY)
    assert "github_repository" in said
    assert "when a session is created" in said
