"""What a process builds once and its routes use: the object behind `app.state.services`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import Request

from managed_agents.blobstore.store import BlobStore
from managed_agents.db.engine import Database
from managed_agents.resources.keys.directory import KeyDirectory
from managed_agents.resources.sessions.events_service import SessionEvents
from managed_agents.resources.sessions.service import Sessions
from managed_agents.web.actor import RateKind
from managed_agents.web.state import Capacity, RateLimiter


@dataclass(frozen=True)
class Services:
    """Composed by `processes/`; satisfies the edge's `EdgeServices`."""

    db: Database
    keys: KeyDirectory
    blobs: BlobStore
    sessions: Sessions
    events: SessionEvents
    require_beta_header: bool = True
    web_search: bool = False
    """Whether the workers have a search provider."""
    rate_limits: RateLimiter | None = None  # None: requests are not counted
    capacity: Capacity = field(default_factory=Capacity)
    # What the rate limits are said to be, counted or not.
    organization_limits: Mapping[RateKind, int] = field(default_factory=lambda: {RateKind.CREATE: 300, RateKind.READ: 1200})


def services(request: Request) -> Services:
    """Return the services of the application that serves `request`."""
    return cast(Services, request.app.state.services)


async def _blobs(request: Request) -> BlobStore:
    return services(request).blobs


Blobs = Annotated[BlobStore, Depends(_blobs)]


async def _web_search(request: Request) -> bool:
    return services(request).web_search


WebSearch = Annotated[bool, Depends(_web_search)]
"""Whether the workers have a search provider."""
