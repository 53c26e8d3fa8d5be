"""Sandboxes in real containers reach a server on loopback, which the operator's setting allows, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from sqlalchemy import text

from managed_agents.processes import egress
from managed_agents.resources.sessions import bindings
from managed_agents.scripted_model import tool_use
from tests.support.egress import server as web_server
from tests.support.stack import TOOLSET, Stack, stack

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

PYTHON = "import urllib.request as u; print(u.urlopen('http://localhost:{port}/').read())"
# The variables except localhost.
TRIES = """
unset NO_PROXY no_proxy
curl -sS http://localhost:{port}/x; echo
curl -sS -p http://localhost:{port}/x; echo
curl -sS -x socks5h://127.0.0.1:3128 http://localhost:{port}/x; echo
python3 -c "{python}"
curl -sS http://other.test/
curl -sS https://other.test/ 2>&1
curl -sS http://169.254.169.254/latest/meta-data/
curl -sS --noproxy '*' -m 2 http://127.0.0.1:{port}/ 2>&1
"""


@asynccontextmanager
async def gateway(running: Stack) -> AsyncIterator[None]:
    settings = running.settings.model_copy(update={"egress_allowed_networks": "127.0.0.0/8,::1/128"})
    async with anyio.create_task_group() as group:
        group.start_soon(egress.serve, settings, running.db)
        yield
        group.cancel_scope.cancel()


def bash(command: str) -> list[Any]:
    return [tool_use("bash", command=command)]


def shown(watch: Any) -> list[str]:
    return [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"]


@pytest.mark.requirement("ENV-043", "ENV-044", "ENV-045", "ENV-046", "ENV-049", "ENV-050", "ENV-051", "ENV-901", "ENV-908")
async def test_a_session_in_a_limited_environment(postgres_url: str, template: str) -> None:
    async with stack(postgres_url, template, sandbox="docker") as running, web_server() as site:
        limited: Any = {"type": "limited", "allowed_hosts": ["localhost"], "allow_package_managers": True}
        environment = await running.client.beta.environments.create(name="l", config={"type": "cloud", "networking": limited})
        agent = await running.agent(
            [
                *(bash(TRIES.format(port=site.port, python=PYTHON.format(port=site.port))), "one"),
                *(bash(f"unset NO_PROXY no_proxy; curl -sS http://localhost:{site.port}/"), "two"),
                *(bash(f"unset NO_PROXY no_proxy; curl -sS http://localhost:{site.port}/; curl -sS http://other.test/"), "three"),
            ],
            tools=TOOLSET,
        )
        session = await running.client.beta.sessions.create(agent=agent.id, environment_id=environment.id)
        async with gateway(running):
            [first] = shown(await running.turn(session))
        lines = first.split("\n")
        assert lines[:4] == ["hello", "hello", "hello", "b'hello'"]
        assert lines[4] == "other.test is not among the hosts that this environment's networking allows."
        assert lines[5] == "curl: (56) CONNECT tunnel failed, response 403"
        assert lines[6].startswith("169.254.169.254 is not among the hosts")
        assert lines[7].startswith("curl: (7) Failed to connect to 127.0.0.1")
        # Without a gateway, a sensible error; with the next one it goes on. A changed environment does not reach this sandbox.
        [second] = shown(await running.turn(session))
        assert second == "The egress gateway of this host does not answer. Please retry.\n"
        await running.client.beta.environments.update(
            environment.id, config={"type": "cloud", "networking": {"type": "unrestricted"}}
        )
        async with gateway(running):
            [third] = shown(await running.turn(session))
        assert third.startswith("helloother.test is not among the hosts")
        # Nor would it reach this session's next one.
        async with running.db.transaction() as tx:
            epoch = (await tx.execute(text("SELECT epoch FROM sessions WHERE id = :id"), {"id": session.id})).scalar_one()
            binding = await bindings.bind(tx, session.id, epoch=epoch, host="another", fingerprint="none")
            assert binding is not None
            assert (binding.generation, binding.networking) == (2, {**limited, "allow_mcp_servers": False})
            await tx.rollback()
        async with running.db.transaction() as tx:
            entries = (await tx.execute(text("SELECT session_id, protocol, host, outcome FROM egress_log ORDER BY id"))).all()
            used = (await tx.execute(text("SELECT egress_bytes FROM sandboxes"))).scalar_one()
        assert {entry.session_id for entry in entries} == {session.id}
        assert sorted((entry.protocol, entry.host, entry.outcome) for entry in entries) == sorted(
            [
                ("http", "localhost", "allowed"),
                ("connect", "localhost", "allowed"),
                ("socks", "localhost", "allowed"),
                ("http", "localhost", "allowed"),
                ("http", "other.test", "blocked"),
                ("connect", "other.test", "blocked"),
                ("http", "169.254.169.254", "blocked"),
                ("http", "localhost", "allowed"),
                ("http", "other.test", "blocked"),
            ]
        )
        assert used >= 5 * len("hello")
        await running.client.beta.sessions.delete(session.id)
        await running.reconcile()
        await running.reconcile()
        async with running.db.transaction() as tx:
            assert (await tx.execute(text("SELECT count(*) FROM egress_log"))).scalar_one() == 0


@pytest.mark.requirement("ENV-902")
async def test_the_local_backend_refuses_what_it_cannot_enforce(server: Stack) -> None:
    limited: Any = {"type": "limited"}
    environment = await server.client.beta.environments.create(name="limited", config={"type": "cloud", "networking": limited})
    agent = await server.agent([bash("true"), "done"], tools=TOOLSET)
    session = await server.client.beta.sessions.create(agent=agent.id, environment_id=environment.id)
    [said] = shown(await server.turn(session))
    assert "networking is limited, which this server's sandboxes cannot enforce" in said
