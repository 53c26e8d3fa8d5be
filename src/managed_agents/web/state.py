"""What the edge needs from the process, and how a route reaches it.

`create_app` puts one object on the application; the edge sees it as `EdgeServices`, resources see all of it
(`resources/services.py`), so that this layer knows nothing of the ones above.
"""

from typing import Annotated, Protocol, cast

from fastapi import Depends
from starlette.requests import Request

from managed_agents.db.engine import Database
from managed_agents.web.actor import Actor


class KeyLookup(Protocol):
    """Finds who a secret belongs to."""

    async def lookup(self, secret: str) -> Actor | None:
        """Return the actor of a live key, None for anything else."""
        ...


class EdgeServices(Protocol):
    """The part of the process's services that the edge uses itself."""

    @property
    def db(self) -> Database: ...
    @property
    def keys(self) -> KeyLookup: ...
    @property
    def require_beta_header(self) -> bool: ...


def edge_services(request: Request) -> EdgeServices:
    """Return the services of the application that serves `request`."""
    return cast(EdgeServices, request.app.state.services)


async def _db(request: Request) -> Database:
    return edge_services(request).db


Db = Annotated[Database, Depends(_db)]
