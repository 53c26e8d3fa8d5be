"""Rules of a session's threads: list, retrieve, archive. Their events are listed and streamed by `events_service`."""

from typing import Any

from sqlalchemy import func, select, tuple_, update

from managed_agents.core.errors import InvalidRequest
from managed_agents.core.ids import WorkspaceId
from managed_agents.db.engine import Database
from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.tables import THREADS
from managed_agents.resources.sessions.events_service import require_session, require_thread
from managed_agents.resources.sessions.present import thread_json
from managed_agents.resources.sessions.schemas import ListThreads
from managed_agents.resources.sessions.service import lock_session
from managed_agents.web import pagination

Json = dict[str, Any]
LISTING = "threads/"  # of one session: a cursor is good for its own list only


async def page(db: Database, workspace_id: WorkspaceId, session_id: str, query: ListThreads) -> Json:
    """One page of threads, oldest first, so the primary one leads. Raises NotFound."""
    statement = select(THREADS, func.clock_timestamp().label("at")).where(THREADS.c.session_id == session_id)
    if query.statuses:
        statement = statement.where(THREADS.c.status.in_(query.statuses))
    if query.page is not None:
        micros, last_id = pagination.decode_cursor(LISTING + session_id, query.page, (int, str))
        key = tuple_(THREADS.c.created_at, THREADS.c.id)
        statement = statement.where(key > tuple_(pagination.from_micros(micros), last_id))
    statement = statement.order_by(THREADS.c.created_at, THREADS.c.id).limit(query.limit + 1)
    async with db.autocommit() as tx:
        await require_session(tx, workspace_id, session_id)
        rows = (await tx.execute(statement)).all()
    return {
        "data": [thread_json(row, row.at) for row in rows[: query.limit]],
        "next_page": pagination.next_page(LISTING + session_id, rows, query.limit),
    }


async def retrieve(db: Database, workspace_id: WorkspaceId, session_id: str, thread_id: str) -> Json:
    """One thread. Raises NotFound."""
    async with db.autocommit() as tx:
        await require_session(tx, workspace_id, session_id)
        row = await require_thread(tx, session_id, thread_id)
    return thread_json(row, row.at)


async def archive(db: Database, hints: Hints, workspace_id: WorkspaceId, session_id: str, thread_id: str) -> Json:
    """End a child thread for good; it stays readable. Repeating it changes nothing.

    Raises:
        NotFound. InvalidRequest: the primary thread, or one that is not idle.
    """
    appended: list[ev.StoredEvent] = []
    async with db.transaction() as tx:
        head = await lock_session(tx, workspace_id, session_id)
        row = await require_thread(tx, session_id, thread_id)
        if row.archived_at is None:
            if row.parent_thread_id is None:
                raise InvalidRequest(f"Thread {thread_id} is the primary thread of its session; archive the session instead.")
            if row.status not in ("idle", "terminated"):
                raise InvalidRequest(
                    f'Thread {thread_id} cannot be archived while its status is "{row.status}". '
                    "Only idle threads may be archived."
                )
            if row.status == "idle":
                appended = head.append([ev.thread_terminated(thread_id, row.agent["name"])])
                await log.write(tx, [head])
            await tx.execute(update(THREADS).where(THREADS.c.id == thread_id).values(archived_at=head.at))
        row = await require_thread(tx, session_id, thread_id)
    if appended:
        hints.appended(appended)
    return thread_json(row, row.at)
