"""A served application, two workspaces, clients."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from anthropic import AsyncAnthropic

from managed_agents.api.app import create_app
from managed_agents.blobstore.local import LocalBlobStore
from managed_agents.db.engine import Database
from managed_agents.db.listener import Doorbell
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.subscribe import Hub
from managed_agents.resources.keys.service import KeyDirectory
from managed_agents.resources.services import Services
from managed_agents.resources.sessions.events_service import SessionEvents
from managed_agents.resources.sessions.service import Sessions
from tests.support.server import HMAC_KEY, SEALER, Caller, listening, make_caller, sdk


@dataclass(frozen=True)
class Served:
    """A running API with two workspaces."""

    base_url: str
    services: Services
    caller: Caller
    stranger: Caller

    def headers(self, *, without: str = "", **more: str) -> dict[str, str]:
        """Return what a complete raw request carries."""
        complete = {
            "x-api-key": self.caller.secret,
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "managed-agents-2026-04-01",
            "content-type": "application/json",
        }
        complete.update({name.replace("_", "-"): value for name, value in more.items()})
        complete.pop(without, None)
        return complete


@pytest.fixture
async def served(db: Database, tmp_path: Path) -> AsyncIterator[Served]:
    hub = Hub(db)
    hints = Hints(hub, Doorbell(db.url))
    services = Services(
        db=db,
        keys=KeyDirectory(db, HMAC_KEY),
        blobs=LocalBlobStore(tmp_path / "blobs"),
        sessions=Sessions(db, hints, SEALER),
        events=SessionEvents(db, hints, hub),
    )
    caller = await make_caller(db, "mine")
    stranger = await make_caller(db, "theirs")
    async with listening(create_app(services)) as base_url:
        yield Served(base_url, services, caller, stranger)


@pytest.fixture
async def client(served: Served) -> AsyncIterator[AsyncAnthropic]:
    async with sdk(served.base_url, served.caller) as made:
        yield made


@pytest.fixture
async def stranger(served: Served) -> AsyncIterator[AsyncAnthropic]:
    async with sdk(served.base_url, served.stranger) as made:
        yield made


@pytest.fixture
async def raw(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.base_url, timeout=30.0, trust_env=False, verify=False) as made:
        yield made
