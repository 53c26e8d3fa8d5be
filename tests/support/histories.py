"""Long histories, written straight into the tables, for what depends on their length.

One event in a thousand is an error, the others alternate; one millisecond lies between two of them.
"""

from sqlalchemy import text

from managed_agents.db.engine import Tx

HEAD = "UPDATE sessions SET last_seq = {last} WHERE id = {session_id}"


def insert_events(session_id: str, thread_id: str, first: str, last: str) -> str:
    """The statement that writes the events `first` to `last`; the arguments are the parameters' names."""
    return f"""
        INSERT INTO events (session_id, seq, id, thread_id, type, processed_at, body)
        SELECT {session_id}, n, 'sevt_01' || n, {thread_id},
            CASE WHEN n % 1000 = 0 THEN 'session.error' WHEN n % 2 = 0 THEN 'agent.message' ELSE 'user.message' END,
            timestamptz '2026-01-01T00:00:00Z' + n * interval '1 millisecond',
            convert_to('{{"type":"user.message","id":"sevt_01' || n || '","content":[{{"type":"text","text":"' ||
                repeat('x', 200) || '"}}],"processed_at":"2026-01-01T00:00:00.000000Z"}}', 'UTF8')
        FROM generate_series(CAST({first} AS bigint), CAST({last} AS bigint)) AS n
    """


async def write_history(tx: Tx, session_id: str, thread_id: str, first: int, last: int) -> None:
    """Give the session the events `first` to `last`."""
    # A colon before a letter is a parameter to SQLAlchemy, and the bodies are full of them.
    statement = insert_events(":session_id", ":thread_id", ":first", ":last").replace('":', '"\\:')
    await tx.execute(text(statement), {"session_id": session_id, "thread_id": thread_id, "first": first, "last": last})
    await tx.execute(text(HEAD.format(last=":last", session_id=":session_id")), {"session_id": session_id, "last": last})
