"""The only writer of the log.

`lock()` takes session rows, `Head.append()` stages events on a locked head (gives `seq` and `processed_at`, folds), and
`write()` sends everything staged in one statement. API commands use the three inside their own transaction, because their
rules are checked under the same row lock (sent events first on a `look()`); the harness reaches them only through the batcher
(`batch.py`).

`write_known()` is all of it in one round trip, for whoever wrote the session last and still has its head, or has just looked at
it (`look()`): what was staged there is written if the row is still the very one that it was then. Any other change of the row,
by whomever, makes it another.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import text

from managed_agents.core import faults
from managed_agents.db.direct import Statement
from managed_agents.db.engine import Tx
from managed_agents.eventlog import statements
from managed_agents.eventlog.fold import Active, SessionState, ThreadState, Totals
from managed_agents.eventlog.head import BudgetReached, Head, InboxFull, LeaseLost, NewInput, SessionGone, TakenAlready

__all__ = ["BudgetReached", "Head", "InboxFull", "LeaseLost", "NewInput", "SessionGone", "TakenAlready"]

BEFORE_WRITE = faults.register("append.before_write", "session locked, nothing written")
BEFORE_COMMIT = faults.register("append.before_commit", "rows written, transaction still open")
BEFORE_KNOWN = faults.register(
    "append.before_known", "events staged on the head as last written, claimed or looked at, nothing sent"
)


# The order of the fields of `Head`, then of its state: rows are unpacked by position, this is the hottest read there is. From
# `last_inbox_seq` on it is the order of `_SESSION_COLUMNS` too, so that what has changed is seen in one comparison.
HEAD_COLUMNS = """
    s.id, s.workspace_id, s.primary_thread_id, s.agent->>'name', clock_timestamp(), s.archived_at IS NOT NULL,
    s.deleted_at IS NOT NULL, s.epoch, s.budget_cents, s.last_seq, s.last_processed_at, s.last_inbox_seq, s.inbox_count,
    s.input_seq, s.handled_seq, s.due_at, s.not_before, s.crashes, s.owner,
    s.status, s.active_seconds, s.running_since, s.requests, s.threads_running, s.threads_active_seconds,
    s.threads_since, s.terminated_at, s.waiting, s.input_tokens, s.output_tokens, s.cache_read_input_tokens,
    s.cache_5m_input_tokens, s.cache_1h_input_tokens, s.web_searches, s.token_cost
"""
HEAD_COLUMNS_COUNT = 35
_HEAD_FIELDS = 19
_FOLLOWING = 11
_LOCK_ONE = text(f"SELECT {HEAD_COLUMNS} FROM sessions s WHERE s.id = :id FOR UPDATE OF s")
_LOCK_ONE_SCOPED = text(
    f"SELECT {HEAD_COLUMNS} FROM sessions s WHERE s.id = :id AND s.workspace_id = :workspace_id FOR UPDATE OF s"
)
_LOCK_MANY = text(
    f"SELECT {HEAD_COLUMNS} FROM sessions s WHERE s.id = ANY(CAST(:ids AS text[])) ORDER BY s.id FOR UPDATE OF s SKIP LOCKED"
)
_THREAD_COLUMNS = """
    t.id, t.status, t.active_seconds, t.running_since, t.started_at, t.idled, t.input_tokens, t.output_tokens,
    t.cache_read_input_tokens, t.cache_5m_input_tokens, t.cache_1h_input_tokens, t.web_searches, t.token_cost
"""
_THREADS = Statement(
    f"SELECT t.session_id, {_THREAD_COLUMNS} FROM session_threads t WHERE t.session_id = ANY(CAST(:ids AS text[]))"
)
# One snapshot: no thread here is of another moment than the session.
_LOOK = Statement(
    f"SELECT {HEAD_COLUMNS}, {statements.VERSION_OF.format('s')}, {_THREAD_COLUMNS} FROM sessions s "
    "LEFT JOIN session_threads t ON t.session_id = s.id WHERE s.id = :id AND s.workspace_id = :workspace_id"
)


def totals_of(row: Any) -> Totals:
    """Read the columns of `TotalsMixin` from a result row."""
    return Totals(
        row.input_tokens,
        row.output_tokens,
        row.cache_read_input_tokens,
        row.cache_5m_input_tokens,
        row.cache_1h_input_tokens,
        row.web_searches,
        row.token_cost,
    )


def session_state_of(row: Any) -> SessionState:
    """Read the folded columns of a session row."""
    return SessionState(
        row.status,
        Active(row.active_seconds, row.running_since),
        totals_of(row),
        row.requests,
        row.threads_running,
        row.threads_active_seconds,
        row.threads_since,
        row.terminated_at,
        _waiting(row.waiting),
    )


def _waiting(stored: str | None) -> dict[str, str]:
    return {} if stored is None else orjson.loads(stored)


def _thread_state(row: Sequence[Any]) -> ThreadState:
    """Read `_THREAD_COLUMNS` behind the id."""
    status, active, since, started_at, idled, *totals = row
    return ThreadState(status, Active(active, since), Totals(*totals), started_at, idled)


def thread_state_of(row: Any) -> ThreadState:
    """Read the folded columns of a thread row."""
    return ThreadState(row.status, Active(row.active_seconds, row.running_since), totals_of(row), row.started_at, row.idled)


def head_of(row: Sequence[Any]) -> Head:
    """Read `HEAD_COLUMNS`."""
    status, active, since, requests, running, threads_active, threads_since, terminated_at, waiting, *totals = row[_HEAD_FIELDS:]
    state = SessionState(
        status,
        Active(active, since),
        Totals(*totals),
        requests,
        running,
        threads_active,
        threads_since,
        terminated_at,
        _waiting(waiting),
    )
    return Head(*row[:_HEAD_FIELDS], state, tuple(row[_FOLLOWING:]))  # pyright: ignore[reportCallIssue]  # a slice of known length


async def lock(tx: Tx, session_id: str, *, workspace_id: str | None = None) -> Head | None:
    """Lock one session row, waiting up to the connection's lock timeout. None when there is no such row (in the workspace)."""
    if workspace_id is None:
        result = await tx.execute(_LOCK_ONE, {"id": session_id})
    else:
        result = await tx.execute(_LOCK_ONE_SCOPED, {"id": session_id, "workspace_id": workspace_id})
    row = result.one_or_none()
    if row is None:
        return None
    head = head_of(row)
    await load_threads(tx, {head.id: head})
    return head


async def look(tx: Tx, session_id: str, *, workspace_id: str) -> tuple[Head, str] | None:
    """Read one session's head with its threads, unlocked, and the version of its row. None: as with `lock`.

    What is staged on it is written by `write_known`, or not at all where anything has changed since.
    """
    rows = await _LOOK.rows(tx, {"id": session_id, "workspace_id": workspace_id})
    if not rows:
        return None
    head, (version, *_) = head_of(rows[0][:HEAD_COLUMNS_COUNT]), rows[0][HEAD_COLUMNS_COUNT:]
    for row in rows:
        thread_id, *thread = row[HEAD_COLUMNS_COUNT + 1 :]
        if thread_id is not None:
            head.threads[thread_id] = _thread_state(thread)
    return head, version


async def lock_available(tx: Tx, session_ids: Sequence[str], *, threads_of: Collection[str]) -> dict[str, Head]:
    """Lock those of `session_ids` that nobody holds, in id order (the order that rules out deadlocks).

    Threads are loaded for the sessions in `threads_of`: those that will get events that change a thread row.
    """
    heads: dict[str, Head] = {}
    for row in (await tx.execute(_LOCK_MANY, {"ids": list(session_ids)})).all():
        heads[row[0]] = head_of(row)
    if threads_of:
        await load_threads(tx, {session_id: head for session_id, head in heads.items() if session_id in threads_of})
    return heads


async def load_threads(tx: Tx, heads: dict[str, Head]) -> None:
    """Read the threads of `heads`, by session id, whose rows are locked, or compared in the statement that writes them.

    A statement of its own, after the lock: a join would show the threads as of before the wait for it.
    """
    for session_id, thread_id, *thread in await _THREADS.rows(tx, {"ids": list(heads)}):
        heads[session_id].threads[thread_id] = _thread_state(thread)


async def write(tx: Tx, heads: Sequence[Head]) -> dict[str, str]:
    """Write what is staged on locked `heads`; returns the version of each row. The caller commits.

    Raises:
        TakenAlready: an event to be taken up is no longer in the inbox; the transaction must be rolled back.
    """
    faults.reach(BEFORE_WRITE)
    written = (await tx.execute(*statements.of_locked(heads))).all()
    if written[0].taken != sum(len(head.taken) for head in heads):
        raise TakenAlready
    faults.reach(BEFORE_COMMIT)
    return {row.id: row.version for row in written}


async def write_known(tx: Tx, heads: Sequence[tuple[Head, str]]) -> tuple[dict[str, str], datetime | None]:
    """Write what is staged on heads whose rows still have the version given with them.

    `tx` is a connection on which each statement is its own transaction, so that this commits, or one inside a unit of work.
    Returns the new versions of the sessions that were written, and the database's clock; the others are as they were, and locked
    by someone or changed.

    Raises:
        DBAPIError (division by zero): an event to be taken up is no longer in the inbox; nothing was written.
    """
    faults.reach(BEFORE_KNOWN)
    statement, values = statements.of_known(heads)
    written = await statement.rows(tx, values)
    return {session_id: version for session_id, version, *_ in written}, written[0][2] if written else None
