"""Who may follow a session and send to it: keys of its workspace, and keys of its environment.

spec: a worker falls back to its environment key for retrieving a session, its events and sending to it. Any other session
is 404 for such a key, with the same text as one that does not exist.
"""

from typing import Annotated

from fastapi import Depends
from sqlalchemy import select

from managed_agents.db.engine import Database
from managed_agents.eventlog.tables import SessionRow
from managed_agents.resources.sessions.service import check_id, not_found
from managed_agents.web.actor import Actor
from managed_agents.web.auth import WorkerDeveloper, WorkerViewer
from managed_agents.web.state import Db


async def _viewer(session_id: str, actor: WorkerViewer, db: Db) -> Actor:
    await _check(db, actor, session_id)
    return actor


async def _developer(session_id: str, actor: WorkerDeveloper, db: Db) -> Actor:
    await _check(db, actor, session_id)
    return actor


async def _check(db: Database, actor: Actor, session_id: str) -> None:
    if actor.environment_id is None:
        return
    check_id(session_id)
    session = select(SessionRow.id).where(
        SessionRow.id == session_id,
        SessionRow.workspace_id == actor.workspace_id,
        SessionRow.environment_id == actor.environment_id,
    )
    async with db.autocommit() as tx:
        if (await tx.scalar(session)) is None:
            raise not_found(session_id)


SessionViewer = Annotated[Actor, Depends(_viewer)]
SessionDeveloper = Annotated[Actor, Depends(_developer)]
