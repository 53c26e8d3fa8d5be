"""A listening server: uvicorn on a loopback port in the test's own event loop, and SDK clients toward it."""

import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2
import uvicorn
from anthropic import AsyncAnthropic
from pydantic import SecretStr
from starlette.types import ASGIApp

from managed_agents.core.ids import WorkspaceId
from managed_agents.db.engine import Database
from managed_agents.encryption.sealing import Sealer
from managed_agents.resources.keys import service as keys
from managed_agents.resources.organizations import service as organizations
from managed_agents.web.actor import Scope

START_SECONDS_MAX = 10.0
END_SECONDS_MAX = 5.0
HMAC_KEY = b"\x17" * 32


class FixedKeys:
    """A key provider whose keys are the same in every test."""

    def derive(self, purpose: str) -> bytes:
        return hashlib.sha256(purpose.encode()).digest()


SEALER = Sealer(FixedKeys(), "tests")
FIRST_KEY = "sk-ma-the-first-key-of-tests"


@dataclass(frozen=True)
class Caller:
    """A key and the workspace it belongs to."""

    workspace_id: WorkspaceId
    secret: str


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[str]:
    """Serve `app` on a free loopback port; yields its base URL."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, loop="none")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        ended = anyio.Event()

        async def serve() -> None:
            await server._serve([listener])
            ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            with anyio.fail_after(START_SECONDS_MAX):
                while not server.started:
                    await anyio.lowlevel.checkpoint()
            try:
                yield base_url
            finally:
                server.should_exit = True
                server.force_exit = True
                # Also when a test failed: cancelled in its midst, a server leaves what the event loop waits for at its own end.
                with anyio.move_on_after(END_SECONDS_MAX, shield=True):
                    await ended.wait()


async def make_caller(db: Database, name: str, scope: Scope = Scope.DEVELOPER) -> Caller:
    """Make a workspace with a key of its own."""
    await keys.bootstrap(db, HMAC_KEY, SecretStr(FIRST_KEY))
    workspace = await organizations.create_workspace(db, name)
    made = await keys.create(db, HMAC_KEY, workspace_id=workspace.id, name=name, scope=scope)
    return Caller(workspace.id, made.secret.get_secret_value())


def sdk(base_url: str, caller: Caller, **options: Any) -> AsyncAnthropic:
    """Return the official client, strict about answers, without retries."""
    return AsyncAnthropic(
        base_url=base_url,
        api_key=caller.secret,
        max_retries=0,
        timeout=30.0,
        _strict_response_validation=True,
        http_client=httpx2.AsyncClient(timeout=30.0, trust_env=False, verify=False),  # plain HTTP: no CA bundle to load
        **options,
    )
