"""Long histories, written straight into the tables, for what depends on their length."""

from sqlalchemy import text

from managed_agents.db.engine import Tx

# One event in a thousand is an error; the rest alternate. One millisecond lies between two of them.
_EVENTS = text("""
    INSERT INTO events (session_id, seq, id, thread_id, type, processed_at, body)
    SELECT :session_id, n, 'sevt_01' || n, :thread_id,
        CASE WHEN n % 1000 = 0 THEN 'session.error' WHEN n % 2 = 0 THEN 'agent.message' ELSE 'user.message' END,
        timestamptz '2026-01-01T00:00:00Z' + n * interval '1 millisecond',
        convert_to('{"type":"user.message","id":"sevt_01' || n || '","content":[{"type":"text","text":"' ||
            repeat('x', 200) || '"}],"processed_at":"2026-01-01T00:00:00.000000Z"}', 'UTF8')
    FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n
""")
_HEAD = text("UPDATE sessions SET last_seq = :last WHERE id = :session_id")


async def write_history(tx: Tx, session_id: str, thread_id: str, last: int, *, first: int = 1) -> None:
    """Give the session the events `first` to `last`."""
    await tx.execute(_EVENTS, {"session_id": session_id, "thread_id": thread_id, "first": first, "last": last})
    await tx.execute(_HEAD, {"session_id": session_id, "last": last})
