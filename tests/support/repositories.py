"""Sessions with repositories: a stack that takes a git host of the tests for the real one, and what its sessions did."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio

from managed_agents.processes import egress
from managed_agents.scripted_model import tool_use
from tests.support.git_server import GitHost
from tests.support.stack import Stack, Variant, stack


@asynccontextmanager
async def repository_stack(host: GitHost, postgres_url: str, template: str) -> AsyncIterator[Stack]:
    """A stack with containers and a gateway."""
    variant = Variant(settings=host.settings)
    async with stack(postgres_url, template, sandbox="docker", variant=variant) as running, anyio.create_task_group() as group:
        group.start_soon(egress.serve, running.settings, running.db)
        yield running
        group.cancel_scope.cancel()


def bash(command: str) -> list[Any]:
    """A reply that runs a command."""
    return [tool_use("bash", command=command)]


def shown(watch: Any) -> list[str]:
    """What the calls said."""
    return [event.content[0].text for event in watch.logged if event.type == "agent.tool_result"]


def errors(watch: Any) -> list[Any]:
    """What the session was told of trouble."""
    return [event.error for event in watch.logged if event.type == "session.error"]


def resource(name: str, **fields: Any) -> dict[str, Any]:
    """A repository of the git host as a session's resource."""
    return {"type": "github_repository", "url": f"https://github.com/{name}", **fields}
