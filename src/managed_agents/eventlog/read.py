"""Reading the log: by cursor for streams, pages and the harness. Every query names its session; workspaces are checked above."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import text

from managed_agents.core import limits
from managed_agents.db.direct import Statement
from managed_agents.db.engine import Tx
from managed_agents.eventlog.events import QueuedEvent, StoredEvent, with_processed_at

LAST_INSTANT = datetime(9999, 1, 1, tzinfo=UTC)  # no event is that late, and nothing can be added to the very last one
_EVENT = "session_id, seq, id, thread_id, type, body, private, for_model"
_PUBLIC = "session_id, seq, id, thread_id, type, body, NULL AS private, for_model"
_QUEUED = "session_id, inbox_seq, id, thread_id, type, payload"

_AFTER = Statement(f"SELECT {_EVENT} FROM events WHERE session_id = :session_id AND seq > :seq ORDER BY seq LIMIT :limit")
CHECKPOINT = "agent.thread_context_compacted"
_QUEUED_AND_FROM_CHECKPOINT = Statement(
    f"(SELECT true, {_QUEUED}, NULL AS private, true AS for_model FROM inbox WHERE session_id = :session_id "
    "ORDER BY inbox_seq LIMIT :queued) UNION ALL "
    f"(SELECT false, {_EVENT} FROM events WHERE session_id = :session_id AND seq >= coalesce("
    f"(SELECT max(seq) FROM events WHERE session_id = :session_id AND type = '{CHECKPOINT}'), 0) ORDER BY seq LIMIT :limit)"
)
_PUBLIC_AFTER = Statement(f"SELECT {_PUBLIC} FROM events WHERE session_id = :session_id AND seq > :seq ORDER BY seq LIMIT :limit")
_OF_TYPES = text(
    f"SELECT {_PUBLIC} FROM events WHERE session_id = :session_id AND thread_id = :thread_id AND for_model "
    "AND type = ANY(CAST(:types AS text[])) ORDER BY seq"
)


def _bounded(body: str, key: str, source: str, order: str) -> str:
    """Rows of `source` in order, as many as `:bytes` hold, and at least two: a message may be as large as a request.

    Sizes are known without reading the bodies, so what is left out is not even read. A row is taken when everything
    before its predecessor fits: the reader needs the first row, and the one that shows that there is more.
    """
    return f"""
        SELECT body, key FROM (
            SELECT body, key, sum(size) OVER win - size - lag(size, 1, 0) OVER win AS before FROM (
                SELECT {body} AS body, {key} AS key, octet_length({body}) AS size FROM {source}
                ORDER BY {key} {order} LIMIT :limit
            ) AS found WINDOW win AS (ORDER BY key {order})
        ) AS measured WHERE before <= :bytes ORDER BY key {order}
    """


_INBOX_AFTER = Statement(
    f"SELECT {_QUEUED} FROM inbox WHERE session_id = :session_id AND inbox_seq > :seq ORDER BY inbox_seq LIMIT :limit"
)


async def after(tx: Tx, session_id: str, seq: int, *, limit: int) -> list[StoredEvent]:
    """Events past `seq` with their private parts, oldest first."""
    rows = await _AFTER.rows(tx, {"session_id": session_id, "seq": seq, "limit": limit})
    return [StoredEvent(*row) for row in rows]


async def from_checkpoint(tx: Tx, session_id: str, *, limit: int) -> tuple[list[QueuedEvent], list[StoredEvent]]:
    """What is queued, and the log from the newest compaction on, that one included; without one from the beginning.

    Oldest first, events with their private parts, all of one moment: whoever sent what waits may have opened a running period in
    the same transaction, and who sees the message must see that too.
    """
    values = {"session_id": session_id, "limit": limit, "queued": limits.INBOX_EVENTS_MAX}
    rows = await _QUEUED_AND_FROM_CHECKPOINT.rows(tx, values)
    # The order within each half is not promised by a union.
    queued = sorted((QueuedEvent(*row[1:7]) for row in rows if row[0]), key=lambda event: event.inbox_seq)
    return queued, sorted((StoredEvent(*row[1:]) for row in rows if not row[0]), key=lambda event: event.seq)


async def public_after(tx: Tx, session_id: str, seq: int, *, limit: int) -> list[StoredEvent]:
    """Events past `seq` as clients see them, oldest first."""
    rows = await _PUBLIC_AFTER.rows(tx, {"session_id": session_id, "seq": seq, "limit": limit})
    return [StoredEvent(*row) for row in rows]


async def of_types(tx: Tx, session_id: str, thread_id: str, types: Sequence[str]) -> list[StoredEvent]:
    """A thread's events of some types that the model has seen, without their private parts, oldest first."""
    rows = await tx.execute(_OF_TYPES, {"session_id": session_id, "thread_id": thread_id, "types": list(types)})
    return [StoredEvent(*row) for row in rows]


async def inbox_after(tx: Tx, session_id: str, inbox_seq: int = 0, *, limit: int = limits.INBOX_EVENTS_MAX) -> list[QueuedEvent]:
    """Queued events past `inbox_seq`, oldest first."""
    rows = await _INBOX_AFTER.rows(tx, {"session_id": session_id, "seq": inbox_seq, "limit": limit})
    return [QueuedEvent(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class HistoryCursor:
    """Where a page begins: the last `seq` and `inbox_seq` already shown, in the list's order."""

    order: Literal["asc", "desc"]
    seq: int | None = None
    inbox_seq: int | None = None


@dataclass(frozen=True, slots=True)
class HistoryFilter:
    """`created_at` bounds compare with `processed_at` (spec: event_list_params.py); a queued event has none and never matches."""

    thread_id: str
    types: Sequence[str] = ()
    gt: datetime | None = None
    gte: datetime | None = None
    lt: datetime | None = None
    lte: datetime | None = None

    @property
    def bounded(self) -> bool:
        return any(bound is not None for bound in (self.gt, self.gte, self.lt, self.lte))


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One listed event: `body` is complete JSON; exactly one of `seq`, `inbox_seq` is set."""

    body: bytes
    seq: int | None
    inbox_seq: int | None


async def history(
    tx: Tx, session_id: str, cursor: HistoryCursor, wanted: HistoryFilter, *, limit: int
) -> tuple[list[HistoryItem], bool]:
    """One page of the history: the log, then what is queued (nulls last; reversed for `desc`), and whether more follows.

    An event that is taken up between two pages is on one of them: where it waited is kept with it.

    A page ends at `limit` events or `EVENTS_PAGE_BYTES_MAX` of bodies, whichever is first, with at least one event.
    """
    items: list[HistoryItem] = []
    if cursor.order == "asc":
        # Also behind a queued event: what was queued beyond it may have moved into the log since.
        items += await _log_part(tx, session_id, cursor, wanted, limit + 1)
        if len(items) <= limit:
            items += await _inbox_part(tx, session_id, cursor, wanted, limit + 1 - len(items))
    else:
        if cursor.seq is None:
            items += await _inbox_part(tx, session_id, cursor, wanted, limit + 1)
        if len(items) <= limit:
            items += await _log_part(tx, session_id, cursor, wanted, limit + 1 - len(items))
    page: list[HistoryItem] = []
    size = 0
    for item in items[:limit]:
        size += len(item.body)
        if page and size > limits.EVENTS_PAGE_BYTES_MAX:
            break
        page.append(item)
    return page, len(items) > len(page)


_FIRST_AT = text("""
    WITH RECURSIVE search(low, high) AS (
        SELECT CAST(0 AS bigint), last_seq + 1 FROM sessions WHERE id = :session_id
        UNION ALL
        SELECT CASE WHEN processed_at < :at THEN middle ELSE low END, CASE WHEN processed_at < :at THEN high ELSE middle END
        FROM search, LATERAL (SELECT (low + high) / 2) AS halved(middle),
            LATERAL (SELECT processed_at FROM events WHERE session_id = :session_id AND seq = middle) AS looked
        WHERE high - low > 1)
    SELECT min(high) FROM search
""")
"""The first `seq` at or after an instant, one beyond the last when there is none.

`seq` has no gaps and `processed_at` rises with it, so halving finds it in some twenty looks at the primary key. An index on
`processed_at` would cost every append, and a filter alone would read the whole log.
"""


async def _first_at(tx: Tx, session_id: str, at: datetime) -> int:
    first: int | None = (await tx.execute(_FIRST_AT, {"session_id": session_id, "at": at})).scalar_one()
    return 0 if first is None else first


async def _seq_conditions(tx: Tx, session_id: str, cursor: HistoryCursor, wanted: HistoryFilter) -> tuple[str, dict[str, Any]]:
    """Cursor and instants as conditions on `seq`, so that a page costs the same wherever it lies."""
    descending = cursor.order == "desc"
    where, values = list[str](), dict[str, Any]()
    if cursor.seq is not None:
        where.append("seq < :seq" if descending else "seq > :seq")
        values["seq"] = cursor.seq
    if cursor.inbox_seq is not None:
        # What an earlier page showed as waiting may stand in the log by now.
        where.append(f"(inbox_seq IS NULL OR inbox_seq {'<' if descending else '>'} :inbox_seq)")
        values["inbox_seq"] = cursor.inbox_seq
    tick = timedelta(microseconds=1)
    for name, sign, shift in (("gte", ">=", False), ("gt", ">=", True), ("lt", "<", False), ("lte", "<", True)):
        if (bound := getattr(wanted, name)) is not None:
            at = min(bound, LAST_INSTANT)
            where.append(f"seq {sign} :{name}")
            values[name] = await _first_at(tx, session_id, at + tick if shift else at)
    return " AND ".join(["session_id = :session_id", *where]), values


async def _log_part(tx: Tx, session_id: str, cursor: HistoryCursor, wanted: HistoryFilter, limit: int) -> list[HistoryItem]:
    order = "DESC" if cursor.order == "desc" else "ASC"
    where, values = await _seq_conditions(tx, session_id, cursor, wanted)
    values |= {"session_id": session_id, "thread_id": wanted.thread_id, "limit": limit, "bytes": limits.EVENTS_PAGE_BYTES_MAX}
    # Not to be looked up in an index: planned for the average session, which is short, a page would be sorted from all events.
    source = f"events WHERE {where} AND (thread_id = :thread_id) IS TRUE"
    if wanted.types:
        # A page of each type from the index, then the first of all of them: rare types do not make it read the others.
        source = f"""unnest(CAST(:types AS text[])) AS wanted(kind), LATERAL (
            SELECT body, seq FROM events WHERE {where} AND thread_id = :thread_id AND type = kind
            ORDER BY seq {order} LIMIT :limit) AS of_kind"""
        values["types"] = list(dict.fromkeys(wanted.types))
    rows = await tx.execute(text(_bounded("body", "seq", source, order)), values)
    return [HistoryItem(row.body, row.key, None) for row in rows]


async def _inbox_part(tx: Tx, session_id: str, cursor: HistoryCursor, wanted: HistoryFilter, limit: int) -> list[HistoryItem]:
    if wanted.bounded:
        return []
    descending = cursor.order == "desc"
    where = ["session_id = :session_id", "thread_id = :thread_id"]
    values: dict[str, Any] = {"session_id": session_id, "thread_id": wanted.thread_id, "limit": limit}
    if cursor.inbox_seq is not None:
        where.append("inbox_seq < :inbox_seq" if descending else "inbox_seq > :inbox_seq")
        values["inbox_seq"] = cursor.inbox_seq
    if wanted.types:
        where.append("type = ANY(CAST(:types AS text[]))")
        values["types"] = list(wanted.types)
    order = "DESC" if descending else "ASC"
    statement = text(_bounded("payload", "inbox_seq", f"inbox WHERE {' AND '.join(where)}", order))
    rows = await tx.execute(statement, {**values, "bytes": limits.EVENTS_PAGE_BYTES_MAX})
    return [HistoryItem(with_processed_at(row.body, None), None, row.key) for row in rows]
