"""What the edge needs from the process, and how a route reaches it.

`create_app` puts one object on the application; the edge sees it as `EdgeServices`, resources see all of it
(`resources/services.py`), so that this layer knows nothing of the ones above.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Protocol, cast

from fastapi import Depends
from starlette.requests import Request

from managed_agents.core import clock
from managed_agents.db.engine import Database
from managed_agents.web.actor import Actor, RateKind


class KeyLookup(Protocol):
    """Finds who a secret belongs to."""

    async def lookup(self, secret: str) -> Actor | None:
        """Return the actor of a live key, None for anything else."""
        ...

    async def in_workspace(self, actor: Actor, workspace_id: str) -> Actor | None:
        """Return an organisation administrator acting in another live workspace of the organisation, None when there is
        no such workspace.
        """
        ...

    async def lost(self, actor: Actor) -> None:
        """Return when `actor` may not go on: its key was revoked or has ended, or its workspace is closed."""
        ...


@dataclass(frozen=True, slots=True)
class Admission:
    """A counted request: the limit that is nearest, what about is left of it, and when all of it is free again."""

    limit: int
    remaining: int
    reset_at: datetime

    def headers(self) -> dict[str, str]:
        """Return what tells the client (spec: the Messages API's names)."""
        return {
            "anthropic-ratelimit-requests-limit": str(self.limit),
            "anthropic-ratelimit-requests-remaining": str(self.remaining),
            "anthropic-ratelimit-requests-reset": clock.millis(self.reset_at),
        }


class RateLimiter(Protocol):
    """Counts requests."""

    async def admit(self, actor: Actor, kind: RateKind) -> Admission:
        """Count one request. Raises `RateLimited`."""
        ...


@dataclass
class Capacity:
    """What all requests of one process may take up together, and take up now (`web/intake.py`)."""

    body_bytes_max: int = 256 * 1024**2
    streams_max: int = 1000
    body_bytes: int = 0
    streams: Counter[str] = field(default_factory=Counter[str])


class EdgeServices(Protocol):
    """The part of the process's services that the edge uses itself."""

    @property
    def db(self) -> Database: ...
    @property
    def keys(self) -> KeyLookup: ...
    @property
    def rate_limits(self) -> RateLimiter | None: ...
    @property
    def capacity(self) -> Capacity: ...
    @property
    def require_beta_header(self) -> bool: ...


def edge_services(request: Request) -> EdgeServices:
    """Return the services of the application that serves `request`."""
    return cast(EdgeServices, request.app.state.services)


async def _db(request: Request) -> Database:
    return edge_services(request).db


Db = Annotated[Database, Depends(_db)]
