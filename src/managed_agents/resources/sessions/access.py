"""Who may follow a session and send to it: keys of its workspace, and keys of its environment.

spec: a worker falls back to its environment key for retrieving a session, its events and sending to it. Any other session
is 404 for such a key, with the same text as one that does not exist.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends
from sqlalchemy import select
from starlette.requests import Request

from managed_agents.eventlog.tables import SessionRow
from managed_agents.resources.sessions.service import check_id, not_found
from managed_agents.web.actor import Actor, Scope
from managed_agents.web.auth import Beta, authenticated
from managed_agents.web.state import edge_services


def _of_session(needed: Scope) -> Callable[[Request, str], Awaitable[Actor]]:
    identify = authenticated(needed, Beta.REQUIRED, environment_keys=True)

    async def dependency(request: Request, session_id: str) -> Actor:
        actor = await identify(request)
        if actor.environment_id is not None:
            check_id(session_id)
            session = select(SessionRow.id).where(
                SessionRow.id == session_id,
                SessionRow.workspace_id == actor.workspace_id,
                SessionRow.environment_id == actor.environment_id,
            )
            async with edge_services(request).db.autocommit() as tx:
                if (await tx.scalar(session)) is None:
                    raise not_found(session_id)
        return actor

    return dependency


SessionViewer = Annotated[Actor, Depends(_of_session(Scope.VIEWER))]
SessionDeveloper = Annotated[Actor, Depends(_of_session(Scope.DEVELOPER))]
