"""Sending, listing and streaming the events of a session and of its threads."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import anyio.lowlevel
from sqlalchemy import func, select

from managed_agents.core import ids
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.core.ids import WorkspaceId
from managed_agents.db.engine import Database, Tx
from managed_agents.eventlog import append as log
from managed_agents.eventlog import interest, read
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.subscribe import Hub
from managed_agents.eventlog.tables import SESSIONS, THREADS
from managed_agents.resources.sessions import inputs
from managed_agents.resources.sessions.schemas import ListEvents, SendEvents, StreamEvents
from managed_agents.resources.sessions.service import check_id, not_found
from managed_agents.web import pagination

Json = dict[str, Any]
EVENTS_LISTING = "events/"


@dataclass(frozen=True, slots=True)
class SessionEvents:
    """The log of the sessions of one process, as clients use it."""

    db: Database
    hints: Hints
    hub: Hub

    async def send(self, workspace_id: WorkspaceId, session_id: str, body: SendEvents) -> bytes:
        """Accept events; returns the answer's JSON. Returns as soon as they are durable.

        Raises:
            NotFound, InvalidRequest: nothing was accepted.
        """
        check_id(session_id)
        accepted = await self._send_at_once(workspace_id, session_id, body)
        if accepted is None:
            accepted = await self._send_locked(workspace_id, session_id, body)
        accepted.announce(self.hints, session_id)
        # The doorbell's turn, before the answer is made: a worker waits for it.
        await anyio.lowlevel.cancel_shielded_checkpoint()
        return b'{"data":[%b]}' % b",".join(accepted.echo)

    async def _send_at_once(self, workspace_id: WorkspaceId, session_id: str, body: SendEvents) -> inputs.Accepted | None:
        """Judge on what the session is now, and write if it still is that: two round trips.

        None when it was not, or was refused: what a refusal rests on was read piece by piece, and may never have been true
        at once.
        """
        async with self.db.autocommit() as tx:
            found = await log.look(tx, session_id, workspace_id=workspace_id)
            if found is None or found[0].deleted:
                raise not_found(session_id)
            try:
                accepted = await inputs.accept(tx, found[0], body.events)
            except (InvalidRequest, NotFound):
                return None
            versions, _ = await log.write_known(tx, [found])
        return accepted if versions else None

    async def _send_locked(self, workspace_id: WorkspaceId, session_id: str, body: SendEvents) -> inputs.Accepted:
        async with self.db.transaction() as tx:
            head = await log.lock(tx, session_id, workspace_id=workspace_id)
            if head is None or head.deleted:
                raise not_found(session_id)
            accepted = await inputs.accept(tx, head, body.events)
            await log.write(tx, [head])
        return accepted

    async def page(self, workspace_id: WorkspaceId, session_id: str, query: ListEvents, *, thread_id: str | None = None) -> bytes:
        """One page of the history of a thread, the primary one by default, as JSON. Raises NotFound, InvalidRequest."""
        cursor = read.HistoryCursor(query.order)
        listing = EVENTS_LISTING + session_id if thread_id is None else thread_id
        if query.page is not None:
            order, seq, inbox_seq = pagination.decode_cursor(listing, query.page, (str, int, int))
            if order != query.order:
                raise InvalidRequest("page token order does not match request")
            cursor = read.HistoryCursor(query.order, None if seq < 0 else seq, None if inbox_seq < 0 else inbox_seq)
        async with self.db.autocommit() as tx:
            head = await require_session(tx, workspace_id, session_id)
            if thread_id is not None:
                await require_thread(tx, session_id, thread_id)
            wanted = read.HistoryFilter(
                thread_id or head.primary_thread_id,
                query.types or (),
                query.created_at_gt,
                query.created_at_gte,
                query.created_at_lt,
                query.created_at_lte,
            )
            items, more = await read.history(tx, session_id, cursor, wanted, limit=query.limit)
        next_page = b"null"
        if more:
            next_page = b'"%b"' % _next(listing, query.order, cursor, items).encode()
        return b'{"data":[%b],"next_page":%b}' % (b",".join(item.body for item in items), next_page)

    async def stream(
        self, workspace_id: WorkspaceId, session_id: str, query: StreamEvents, *, thread_id: str | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Open a stream of what is appended to a thread, the primary one by default, from now on.

        Of what has ended that is nothing, and it ends at once. Raises NotFound before anything is sent.
        """
        previews = frozenset(query.event_deltas or ())
        async with self.db.autocommit() as tx:
            head = await require_session(tx, workspace_id, session_id)
            thread = None if thread_id is None else await require_thread(tx, session_id, thread_id)
            if head.terminated_at is not None or (thread is not None and thread.status == "terminated"):
                return _nothing()
            if previews:
                # Registered first, positions read after: a model request that starts behind them sees the interest.
                await interest.register(tx, [session_id])
                head = await require_session(tx, workspace_id, session_id)
        return self.hub.subscribe(
            session_id,
            thread_id or head.primary_thread_id,
            seq=head.last_seq,
            inbox_seq=head.last_inbox_seq,
            previews=previews,
        )


async def require_session(tx: Tx, workspace_id: WorkspaceId, session_id: str) -> Any:
    """The head of a session of the workspace. Raises NotFound."""
    check_id(session_id)
    row = (
        await tx.execute(
            select(SESSIONS.c.primary_thread_id, SESSIONS.c.last_seq, SESSIONS.c.last_inbox_seq, SESSIONS.c.terminated_at).where(
                SESSIONS.c.id == session_id,
                SESSIONS.c.workspace_id == workspace_id,
                SESSIONS.c.deleted_at.is_(None),
            )
        )
    ).one_or_none()
    if row is None:
        raise not_found(session_id)
    return row


async def require_thread(tx: Tx, session_id: str, thread_id: str) -> Any:
    """A thread of the session, with the database's instant `at`. Raises NotFound."""
    row = None
    if ids.has_prefix(thread_id, ids.THREAD):
        statement = select(THREADS, func.clock_timestamp().label("at"))
        statement = statement.where(THREADS.c.session_id == session_id, THREADS.c.id == thread_id)
        row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise NotFound(f"Thread {thread_id[:100]} not found", error_code="thread_not_found")
    return row


def _next(listing: str, order: str, cursor: read.HistoryCursor, items: list[read.HistoryItem]) -> str:
    """The cursor behind the last item: both positions, -1 for the part not reached yet."""
    seq = -1 if cursor.seq is None else cursor.seq
    inbox_seq = -1 if cursor.inbox_seq is None else cursor.inbox_seq
    for item in items:
        seq = seq if item.seq is None else item.seq
        inbox_seq = inbox_seq if item.inbox_seq is None else item.inbox_seq
    return pagination.encode_cursor(listing, [order, seq, inbox_seq])


async def _nothing() -> AsyncGenerator[bytes, None]:
    for frame in ():
        yield frame
