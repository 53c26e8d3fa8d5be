"""The only writer of the log.

`lock()` takes session rows, `Head.append()` stages events on a locked head (gives `seq` and `processed_at`, folds), and
`write()` sends everything staged in one statement. API commands use the three inside their own transaction, because their
rules are checked under the same row lock; the harness reaches them only through the batcher (`batch.py`).

`processed_at` is the database's clock under the lock, at least one microsecond after the session's previous event: strictly
rising within a session, whichever process writes.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import orjson
from sqlalchemy import TextClause, text

from managed_agents.core import clock, faults
from managed_agents.db.engine import Tx
from managed_agents.eventlog import fold
from managed_agents.eventlog.events import NewEvent, QueuedEvent, StoredEvent, with_processed_at
from managed_agents.eventlog.fold import Active, SessionState, ThreadState, Totals

BEFORE_WRITE = faults.register("append.before_write", "session locked, nothing written")
BEFORE_COMMIT = faults.register("append.before_commit", "rows written, transaction still open")
_MICROSECOND = timedelta(microseconds=1)


class LeaseLost(Exception):
    """The writer no longer owns the session: stop, and write nothing more."""


class NewInput(Exception):
    """Input arrived that the writer's decision did not know of: decide again."""


class BudgetReached(Exception):
    """The session's budget lets no further model request begin."""


class SessionGone(Exception):
    """The session was deleted."""


class InboxFull(Exception):
    """The session's inbox holds its maximum."""


class TakenAlready(Exception):
    """A queued event to be taken up is not in the inbox any more (a retry after a commit nobody heard of)."""


@dataclass(slots=True)
class Head:
    """A session row under lock: the values read, and everything staged to be written."""

    id: str
    workspace_id: str
    primary_thread_id: str
    agent_name: str
    at: datetime
    archived: bool
    deleted: bool
    epoch: int
    budget_cents: int | None
    last_seq: int
    last_processed_at: datetime | None
    last_inbox_seq: int
    inbox_count: int
    input_seq: int
    handled_seq: int
    due_at: datetime | None
    not_before: datetime | None
    crashes: int
    owner: str | None
    state: SessionState
    loaded: tuple[Any, ...]
    threads: dict[str, ThreadState] = field(default_factory=dict[str, ThreadState])
    events: list[tuple[NewEvent, StoredEvent, datetime]] = field(default_factory=list[tuple[NewEvent, StoredEvent, datetime]])
    queued: list[QueuedEvent] = field(default_factory=list[QueuedEvent])
    taken: list[str] = field(default_factory=list[str])
    touched_threads: set[str] = field(default_factory=set[str])

    def append(self, events: Iterable[NewEvent]) -> list[StoredEvent]:
        """Stage `events` in order. Returns them as they will be stored."""
        stored: list[StoredEvent] = []
        for event in events:
            at = self.at
            if self.last_processed_at is not None:
                at = max(at, self.last_processed_at + _MICROSECOND)
            assert self.last_processed_at is None or at > self.last_processed_at
            thread = self.threads.get(event.thread_id)
            if event.type in fold.THREAD_TYPES or event.usage is not None:
                self.touched_threads.add(event.thread_id)
            fold.apply(self.state, thread, event.type, at, event.usage)
            fold.apply_call(self.state, event.type, event.id, event.tool_use_id, event.awaits)
            payload = event.payload if event.payload is not None else self._usage_payload(event.id, at)
            self.last_seq += 1
            self.last_processed_at = at
            row = StoredEvent(
                self.id,
                self.last_seq,
                event.id,
                event.thread_id,
                event.type,
                with_processed_at(payload, clock.micros(at)),
                event.private,
                event.for_model,
            )
            self.events.append((event, row, at))
            stored.append(row)
        return stored

    @property
    def at_cap(self) -> bool:
        """Whether the budget is used up now, to the microsecond of the lock."""
        return fold.at_cap(self.budget_cents, self.state.totals, self.state.active.until(self.at))

    def enqueue(self, events: Iterable[NewEvent], *, maximum: int) -> list[QueuedEvent]:
        """Stage client events that have to wait.

        Raises:
            InboxFull: more than `maximum` would wait.
        """
        queued: list[QueuedEvent] = []
        for event in events:
            assert event.payload is not None
            self.last_inbox_seq += 1
            self.inbox_count += 1
            if self.inbox_count > maximum:
                raise InboxFull
            row = QueuedEvent(self.id, self.last_inbox_seq, event.id, event.thread_id, event.type, event.payload)
            self.queued.append(row)
            queued.append(row)
        return queued

    def _usage_payload(self, event_id: str, at: datetime) -> bytes:
        usage = fold.usage_json(self.state.totals, self.state.active.until(at), measured=self.state.requests > 0, runtime=True)
        budget = fold.budget_json(self.budget_cents)
        return orjson.dumps({"type": "session.usage", "id": event_id, "usage": usage, "budget": budget})


# The order of the fields of `Head`, then of its state: rows are unpacked by position, this is the hottest read there is. From
# `last_inbox_seq` on it is the order of `_SESSION_COLUMNS` too, so that what has changed is seen in one comparison.
_HEAD_COLUMNS = """
    s.id, s.workspace_id, s.primary_thread_id, s.agent->>'name', clock_timestamp(), s.archived_at IS NOT NULL,
    s.deleted_at IS NOT NULL, s.epoch, s.budget_cents, s.last_seq, s.last_processed_at, s.last_inbox_seq, s.inbox_count,
    s.input_seq, s.handled_seq, s.due_at, s.not_before, s.crashes, s.owner,
    s.status, s.active_seconds, s.running_since, s.requests, s.threads_running, s.threads_active_seconds,
    s.threads_since, s.terminated_at, s.waiting, s.input_tokens, s.output_tokens, s.cache_read_input_tokens,
    s.cache_5m_input_tokens, s.cache_1h_input_tokens, s.web_searches, s.token_cost
"""
_HEAD_FIELDS = 19
_FOLLOWING = 11
_LOCK_ONE = text(f"SELECT {_HEAD_COLUMNS} FROM sessions s WHERE s.id = :id FOR UPDATE OF s")
_LOCK_ONE_SCOPED = text(
    f"SELECT {_HEAD_COLUMNS} FROM sessions s WHERE s.id = :id AND s.workspace_id = :workspace_id FOR UPDATE OF s"
)
_LOCK_MANY = text(
    f"SELECT {_HEAD_COLUMNS} FROM sessions s WHERE s.id = ANY(CAST(:ids AS text[])) ORDER BY s.id FOR UPDATE OF s SKIP LOCKED"
)
_THREADS = text(
    "SELECT id, session_id, status, active_seconds, running_since, started_at, idled, input_tokens, output_tokens, "
    "cache_read_input_tokens, cache_5m_input_tokens, cache_1h_input_tokens, web_searches, token_cost "
    "FROM session_threads WHERE session_id = ANY(CAST(:ids AS text[]))"
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


def thread_state_of(row: Any) -> ThreadState:
    """Read the folded columns of a thread row."""
    return ThreadState(row.status, Active(row.active_seconds, row.running_since), totals_of(row), row.started_at, row.idled)


def _head(row: Sequence[Any]) -> Head:
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
    head = _head(row)
    await _load_threads(tx, {head.id: head})
    return head


async def lock_available(tx: Tx, session_ids: Sequence[str], *, threads_of: Collection[str]) -> dict[str, Head]:
    """Lock those of `session_ids` that nobody holds, in id order (the order that rules out deadlocks).

    Threads are loaded for the sessions in `threads_of`: those that will get events that change a thread row.
    """
    heads: dict[str, Head] = {}
    for row in (await tx.execute(_LOCK_MANY, {"ids": list(session_ids)})).all():
        heads[row[0]] = _head(row)
    if threads_of:
        await _load_threads(tx, {session_id: head for session_id, head in heads.items() if session_id in threads_of})
    return heads


async def _load_threads(tx: Tx, heads: dict[str, Head]) -> None:
    # A second statement, after the lock: a join would show the threads as of before the wait for the lock.
    for row in (await tx.execute(_THREADS, {"ids": list(heads)})).all():
        heads[row.session_id].threads[row.id] = thread_state_of(row)


_TOTALS_COLUMNS = (
    ("input_tokens", "bigint"),
    ("output_tokens", "bigint"),
    ("cache_read_input_tokens", "bigint"),
    ("cache_5m_input_tokens", "bigint"),
    ("cache_1h_input_tokens", "bigint"),
    ("web_searches", "bigint"),
    ("token_cost", "numeric"),
)
_MOVED_COLUMNS = (
    ("id", "text"),
    ("updated_at", "timestamptz"),
    ("last_seq", "bigint"),
    ("last_processed_at", "timestamptz"),
)
"""What every append changes; most change nothing else."""
_SESSION_COLUMNS = (
    *_MOVED_COLUMNS,
    ("last_inbox_seq", "bigint"),
    ("inbox_count", "int"),
    ("input_seq", "bigint"),
    ("handled_seq", "bigint"),
    ("due_at", "timestamptz"),
    ("not_before", "timestamptz"),
    ("crashes", "int"),
    ("owner", "text"),
    ("status", "text"),
    ("active_seconds", "float8"),
    ("running_since", "timestamptz"),
    ("requests", "bigint"),
    ("threads_running", "int"),
    ("threads_active_seconds", "float8"),
    ("threads_since", "timestamptz"),
    ("terminated_at", "timestamptz"),
    ("waiting", "text"),
    *_TOTALS_COLUMNS,
)
_THREAD_COLUMNS = (
    ("id", "text"),
    ("updated_at", "timestamptz"),
    ("status", "text"),
    ("active_seconds", "float8"),
    ("running_since", "timestamptz"),
    ("started_at", "timestamptz"),
    ("idled", "bool"),
    *_TOTALS_COLUMNS,
)
_EVENT_COLUMNS = (
    ("session_id", "text"),
    ("seq", "bigint"),
    ("id", "text"),
    ("thread_id", "text"),
    ("type", "text"),
    ("processed_at", "timestamptz"),
    ("inbox_seq", "bigint"),
    ("tool_use_id", "text"),
    ("for_model", "bool"),
    ("body", "bytea"),
    ("private", "bytea"),
)
_INBOX_COLUMNS = (
    ("session_id", "text"),
    ("inbox_seq", "bigint"),
    ("id", "text"),
    ("thread_id", "text"),
    ("type", "text"),
    ("payload", "bytea"),
)

_Columns = tuple[tuple[str, str], ...]


def _unnest(prefix: str, columns: _Columns) -> str:
    return ", ".join(f"CAST(:{prefix}{name} AS {kind}[])" for name, kind in columns)


def _insert(table: str, prefix: str, columns: _Columns) -> str:
    names = ", ".join(name for name, _ in columns)
    return f"INSERT INTO {table} ({names}) SELECT * FROM unnest({_unnest(prefix, columns)})"


def _update(table: str, prefix: str, columns: _Columns) -> str:
    names = ", ".join(name for name, _ in columns)
    assignments = ", ".join(f"{name} = v.{name}" for name, _ in columns if name != "id")
    return f"UPDATE {table} t SET {assignments} FROM unnest({_unnest(prefix, columns)}) AS v({names}) WHERE t.id = v.id"


_SQL = {
    "moved": _update("sessions", "m_", _MOVED_COLUMNS),
    "sessions": _update("sessions", "s_", _SESSION_COLUMNS),
    "threads": _update("session_threads", "t_", _THREAD_COLUMNS),
    "events": _insert("events", "e_", _EVENT_COLUMNS),
    "inbox": _insert("inbox", "i_", _INBOX_COLUMNS),
    "taken": "DELETE FROM inbox USING unnest(CAST(:d_session_id AS text[]), CAST(:d_id AS text[])) AS v(session_id, id) "
    "WHERE inbox.session_id = v.session_id AND inbox.id = v.id RETURNING 1",
}
_PREFIXES = {
    "moved": ("m_", _MOVED_COLUMNS),
    "sessions": ("s_", _SESSION_COLUMNS),
    "threads": ("t_", _THREAD_COLUMNS),
    "events": ("e_", _EVENT_COLUMNS),
    "inbox": ("i_", _INBOX_COLUMNS),
    "taken": ("d_", (("session_id", "text"), ("id", "text"))),
}


@cache
def _statement(parts: tuple[str, ...]) -> TextClause:
    """One round trip for everything staged: data-modifying CTEs. Returns how many inbox rows were taken up."""
    writes = ", ".join(f"w_{part} AS ({_SQL[part]})" for part in parts)
    return text(f"WITH {writes} SELECT {'(SELECT count(*) FROM w_taken)' if 'taken' in parts else '0'}")


def _columns(prefix: str, columns: _Columns, rows: list[tuple[Any, ...]]) -> dict[str, list[Any]]:
    arrays = [list(column) for column in zip(*rows, strict=True)]
    return {f"{prefix}{name}": array for (name, _), array in zip(columns, arrays, strict=True)}


def _totals_values(totals: Totals) -> tuple[Any, ...]:
    return (
        totals.input_tokens,
        totals.output_tokens,
        totals.cache_read_input_tokens,
        totals.cache_5m_input_tokens,
        totals.cache_1h_input_tokens,
        totals.web_searches,
        totals.token_cost,
    )


def _session_values(head: Head) -> tuple[Any, ...]:
    state = head.state
    return (
        head.id,
        head.at,
        head.last_seq,
        head.last_processed_at,
        head.last_inbox_seq,
        head.inbox_count,
        head.input_seq,
        head.handled_seq,
        head.due_at,
        head.not_before,
        head.crashes,
        head.owner,
        state.status,
        state.active.seconds,
        state.active.since,
        state.requests,
        state.threads_running,
        state.threads_active_seconds,
        state.threads_since,
        state.terminated_at,
        orjson.dumps(state.waiting).decode() if state.waiting else None,
        *_totals_values(state.totals),
    )


def _thread_values(head: Head, thread_id: str) -> tuple[Any, ...]:
    state = head.threads[thread_id]
    return (
        thread_id,
        head.at,
        state.status,
        state.active.seconds,
        state.active.since,
        state.started_at,
        state.idled,
        *_totals_values(state.totals),
    )


def _event_values(event: NewEvent, row: StoredEvent, at: datetime) -> tuple[Any, ...]:
    return (
        row.session_id,
        row.seq,
        row.id,
        row.thread_id,
        row.type,
        at,
        event.inbox_seq,
        event.tool_use_id,
        row.for_model,
        row.body,
        row.private,
    )


async def write(tx: Tx, heads: Sequence[Head]) -> None:
    """Write what is staged on `heads`. The caller commits.

    Raises:
        TakenAlready: an event to be taken up is no longer in the inbox; the transaction must be rolled back.
    """
    faults.reach(BEFORE_WRITE)
    following = len(_MOVED_COLUMNS)
    sessions = [(head, _session_values(head)) for head in heads]
    staged: dict[str, list[tuple[Any, ...]]] = {
        "moved": [values[:following] for head, values in sessions if values[following:] == head.loaded],
        "sessions": [values for head, values in sessions if values[following:] != head.loaded],
        "threads": [_thread_values(head, thread) for head in heads for thread in sorted(head.touched_threads)],
        "events": [_event_values(*event) for head in heads for event in head.events],
        "inbox": [
            (row.session_id, row.inbox_seq, row.id, row.thread_id, row.type, row.payload) for head in heads for row in head.queued
        ],
        "taken": [(head.id, event_id) for head in heads for event_id in head.taken],
    }
    parts = tuple(part for part, rows in staged.items() if rows)
    parameters: dict[str, Any] = {}
    for part in parts:
        parameters |= _columns(*_PREFIXES[part], staged[part])
    deleted: int = (await tx.execute(_statement(parts), parameters)).scalar_one()
    if deleted != len(staged["taken"]):
        raise TakenAlready
    faults.reach(BEFORE_COMMIT)
