"""What is staged on heads as one statement: data-modifying CTEs, an array for each column.

There are two forms. One writes rows that its transaction has locked before. The other takes heads as they were last written and
locks, compares, and writes by itself: a session whose row has another version by now, or is locked by somebody else, is left
out with all that belongs to it. Both return the versions of the session rows they wrote.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

import orjson
from sqlalchemy import TextClause, text

from managed_agents.db.direct import Statement
from managed_agents.eventlog.events import NewEvent, StoredEvent
from managed_agents.eventlog.fold import Totals
from managed_agents.eventlog.head import Head

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


# Ours alone write these, and never a comma or an empty one into them: they go as one text each. The driver asks every element
# of an array whether it is an array itself, which costs more than all the rest of a batch's way to it.
_LISTED = frozenset({"e_session_id", "e_id", "e_thread_id", "e_type", "e_tool_use_id"})


def _array(name: str, kind: str) -> str:
    return f"string_to_array(CAST(:{name} AS text), ',', '')" if name in _LISTED else f"CAST(:{name} AS {kind}[])"


def _unnest(prefix: str, columns: _Columns) -> str:
    return ", ".join(_array(f"{prefix}{name}", kind) for name, kind in columns)


def _rows(prefix: str, columns: _Columns) -> str:
    names = ", ".join(name for name, _ in columns)
    return f"unnest({_unnest(prefix, columns)}) AS v({names})"


def _insert(table: str, prefix: str, columns: _Columns, only: str = "") -> str:
    names = ", ".join(name for name, _ in columns)
    return f"INSERT INTO {table} ({names}) SELECT {names} FROM {_rows(prefix, columns)}{only}"


def _update(table: str, prefix: str, columns: _Columns, only: str = "") -> str:
    assignments = ", ".join(f"{name} = v.{name}" for name, _ in columns if name != "id")
    return f"UPDATE {table} t SET {assignments} FROM {_rows(prefix, columns)} WHERE t.id = v.id{only}"


# The transaction that wrote the row; beside it what every write or claim moves, because after a failover numbers of transactions
# that were lost are given again.
VERSION_OF = "{0}.xmin::text || ':' || {0}.last_seq || ':' || {0}.input_seq || ':' || {0}.epoch || ':' || coalesce({0}.owner, '')"
_VERSION = f" RETURNING t.id, {VERSION_OF.format('t')} AS version"
_TAKEN = (
    "DELETE FROM inbox USING unnest(CAST(:d_session_id AS text[]), CAST(:d_id AS text[])) AS v(session_id, id) "
    "WHERE inbox.session_id = v.session_id AND inbox.id = v.id"
)
_LOCKED = {
    "moved": _update("sessions", "m_", _MOVED_COLUMNS) + _VERSION,
    "sessions": _update("sessions", "s_", _SESSION_COLUMNS) + _VERSION,
    "threads": _update("session_threads", "t_", _THREAD_COLUMNS),
    "events": _insert("events", "e_", _EVENT_COLUMNS),
    "inbox": _insert("inbox", "i_", _INBOX_COLUMNS),
    "taken": _TAKEN + " RETURNING 1",
}
_ONLY_KNOWN = "(SELECT id FROM known)"
_KNOWN = {
    "moved": _update("sessions", "m_", _MOVED_COLUMNS, f" AND t.id IN {_ONLY_KNOWN}") + _VERSION,
    "sessions": _update("sessions", "s_", _SESSION_COLUMNS, f" AND t.id IN {_ONLY_KNOWN}") + _VERSION,
    "threads": _update("session_threads", "t_", _THREAD_COLUMNS, f" AND t.session_id IN {_ONLY_KNOWN}"),
    "events": _insert("events", "e_", _EVENT_COLUMNS, f" WHERE v.session_id IN {_ONLY_KNOWN}"),
    "inbox": _insert("inbox", "i_", _INBOX_COLUMNS, f" WHERE v.session_id IN {_ONLY_KNOWN}"),
    "taken": f"{_TAKEN} AND inbox.session_id IN {_ONLY_KNOWN} RETURNING 1",
}
# The version is compared again on the row as locked, should it have changed after the statement began.
_LOCK_KNOWN = (
    "known AS (SELECT s.id FROM unnest(CAST(:k_id AS text[]), CAST(:k_version AS text[])) AS k(id, version) "
    f"JOIN sessions s ON s.id = k.id AND {VERSION_OF.format('s')} = k.version FOR UPDATE OF s SKIP LOCKED)"
)
# Undoes the whole statement (division by zero) where a queued event was taken up before.
_ALL_TAKEN = (
    "1 / (CASE WHEN (SELECT count(*) FROM w_taken) = (SELECT count(*) FROM unnest(CAST(:d_session_id AS text[])) "
    f"AS d(session_id) WHERE d.session_id IN {_ONLY_KNOWN}) THEN 1 ELSE 0 END)"
)
_PREFIXES = {
    "moved": ("m_", _MOVED_COLUMNS),
    "sessions": ("s_", _SESSION_COLUMNS),
    "threads": ("t_", _THREAD_COLUMNS),
    "events": ("e_", _EVENT_COLUMNS),
    "inbox": ("i_", _INBOX_COLUMNS),
    "taken": ("d_", (("session_id", "text"), ("id", "text"))),
}


def _versions(parts: tuple[str, ...]) -> str:
    return " UNION ALL ".join(f"SELECT id, version FROM w_{part}" for part in ("moved", "sessions") if part in parts)


@cache
def _locked(parts: tuple[str, ...]) -> TextClause:
    writes = ", ".join(f"w_{part} AS ({_LOCKED[part]})" for part in parts)
    taken = "(SELECT count(*) FROM w_taken)" if "taken" in parts else "0"
    return text(f"WITH {writes} SELECT id, version, {taken} AS taken FROM ({_versions(parts)}) w")


@cache
def _known(parts: tuple[str, ...]) -> Statement:
    writes = ", ".join(f"w_{part} AS ({_KNOWN[part]})" for part in parts)
    checked = _ALL_TAKEN if "taken" in parts else "1"
    return Statement(
        f"WITH {_LOCK_KNOWN}, {writes} SELECT id, version, clock_timestamp() AS at, {checked} FROM ({_versions(parts)}) w"
    )


def of_locked(heads: Sequence[Head]) -> tuple[TextClause, dict[str, Any]]:
    """The statement for heads that are locked. Its rows: `id`, `version`, and `taken`, the count of inbox rows taken up."""
    parts, parameters = _parameters(heads)
    return _locked(parts), parameters


def of_known(heads: Sequence[tuple[Head, str]]) -> tuple[Statement, dict[str, Any]]:
    """The statement for heads with the versions of their rows. Its rows, `id`, `version`, and the clock, `at`."""
    parts, parameters = _parameters([head for head, _ in heads])
    parameters |= {"k_id": [head.id for head, _ in heads], "k_version": [version for _, version in heads]}
    return _known(parts), parameters


def _parameters(heads: Sequence[Head]) -> tuple[tuple[str, ...], dict[str, Any]]:
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
    return parts, parameters


def begin_again(head: Head) -> None:
    """Forget what was staged: it is written, and the head is what its row says now."""
    head.loaded = _session_values(head)[len(_MOVED_COLUMNS) :]
    head.events, head.queued, head.taken, head.touched_threads = [], [], [], set()


def _columns(prefix: str, columns: _Columns, rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (name, _), column in zip(columns, zip(*rows, strict=True), strict=True):
        key = f"{prefix}{name}"
        found[key] = ",".join([value or "" for value in column]) if key in _LISTED else list(column)
    return found


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
