"""The end of a turn that nobody could run: told, closed and idle, so that a client sees it and can begin anew.

Whatever failed may be the harness, the conversation it makes of the log, or an event that cannot be read at all. So nothing of
them is used here: which model request is open and which calls have no result is asked of the table, from types and ids alone. The
append is guarded like any other; input that comes meanwhile is flushed with the rest.
"""

import logging

from sqlalchemy import text

from managed_agents.core.errors import TransientError
from managed_agents.db.engine import Database, Tx
from managed_agents.eventlog import events as ev
from managed_agents.eventlog import read
from managed_agents.eventlog.append import NewInput, SessionGone
from managed_agents.eventlog.batch import Append, Appender, Rest
from managed_agents.eventlog.events import NewEvent
from managed_agents.harness.journal import CUT, INTERRUPTED
from managed_agents.harness.lease import Claim

logger = logging.getLogger(__name__)

MESSAGE = "The server failed repeatedly while running this turn. Send a message to retry."
TRIES_MAX = 20  # each lost to input that came just then

_SESSION = text("SELECT input_seq, status FROM sessions WHERE id = :id AND deleted_at IS NULL")
_OPEN = text("""
    SELECT id, type FROM events e WHERE session_id = :id AND (
        type = 'span.model_request_start' AND NOT EXISTS (
            SELECT 1 FROM events o WHERE o.session_id = :id AND o.type = 'span.model_request_end' AND o.seq > e.seq)
        OR type IN ('agent.tool_use', 'agent.custom_tool_use') AND NOT EXISTS (
            SELECT 1 FROM events r WHERE r.session_id = :id AND r.tool_use_id = e.id AND r.seq > e.seq
              AND r.type IN ('agent.tool_result', 'user.custom_tool_result')))
    ORDER BY seq
""")


class GivingUp:
    """Runs one claimed session whose turn failed `limits.CRASHES_MAX` times in a row."""

    handed_over = False

    def __init__(self, db: Database, appender: Appender, claim: Claim, worker_id: str) -> None:
        self.claim = claim
        self._db = db
        self._appender = appender
        self._worker_id = worker_id

    def notify(self) -> None:
        """New input is seen by the append's guard."""

    def drain(self) -> None:
        """It is a matter of one append."""

    async def run(self) -> None:
        """Append the end of the turn, and rest.

        Raises:
            LeaseLost, SessionGone, AppendUncertain, SQLAlchemyError: stop; the log is what it is.
        """
        logger.error("giving up the turn of %s: it failed %d times in a row", self.claim.session_id, self.claim.crashes)
        for _ in range(TRIES_MAX):
            async with self._db.autocommit() as tx:
                append = await self._ending(tx)
            try:
                await self._appender.append(append)
            except NewInput:
                continue
            return
        raise TransientError(f"input of {self.claim.session_id} came faster than its turn could be given up")

    async def _ending(self, tx: Tx) -> Append:
        session_id, thread_id, name = self.claim.session_id, self.claim.thread_id, self.claim.agent["name"]
        # `input_seq` first: an older figure is the worst that can happen.
        found = (await tx.execute(_SESSION, {"id": session_id})).one_or_none()
        if found is None:
            raise SessionGone
        inbox = await read.inbox_after(tx, session_id)
        events: list[NewEvent] = []
        if found.status != "terminated":
            opened = (await tx.execute(_OPEN, {"id": session_id})).all()
            # Nobody may see an idle session become idle, except that a wait for the client's answers ends.
            if found.status == "idle" and not opened:
                events += ev.running(thread_id, name)
            events += [_closing(thread_id, row.id, row.type) for row in opened]
            events.append(ev.session_error(thread_id, "unknown_error", MESSAGE, "exhausted"))
        events += [queued.taken_up(for_model=False) for queued in inbox]
        if found.status != "terminated":
            events += ev.idle(thread_id, name, {"type": "retries_exhausted"})
        return Append(
            session_id,
            events,
            self._worker_id,
            self.claim.epoch,
            expect_input_seq=found.input_seq,
            taken=inbox,
            rest=Rest(),
        )


def _closing(thread_id: str, event_id: str, event_type: str) -> NewEvent:
    if event_type == "span.model_request_start":
        return ev.span_end(thread_id, event_id, ev.SpanUsage(), is_error=True, private=CUT)
    return ev.tool_result(thread_id, event_id, [{"type": "text", "text": INTERRUPTED}], is_error=True)
