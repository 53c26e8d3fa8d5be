"""Removes the rows of deleted sessions, in chunks, so that no transaction is long and no lock is held for long."""

from sqlalchemy import text

from managed_agents.db.engine import Database

CHUNK_ROWS = 1000
SESSIONS_AT_ONCE = 20

_DELETED = text("SELECT id FROM sessions WHERE deleted_at IS NOT NULL ORDER BY deleted_at LIMIT :limit")
# The trigger on `events` refuses every other DELETE. Local to the transaction.
_ALLOW = text("SELECT set_config('managed_agents.erasing', 'on', true)")
_CHUNK = text(
    "DELETE FROM events WHERE session_id = :id AND seq IN "
    "(SELECT seq FROM events WHERE session_id = :id ORDER BY seq LIMIT :limit)"
)
_REST = (
    text("DELETE FROM inbox WHERE session_id = :id"),
    text("DELETE FROM session_resources WHERE session_id = :id"),
    text("DELETE FROM session_threads WHERE session_id = :id"),
    text("DELETE FROM files WHERE session_id = :id"),
    text("DELETE FROM sandbox_snapshots WHERE session_id = :id"),
    text("DELETE FROM egress_log WHERE session_id = :id"),
)
# Only when its sandboxes are destroyed too: their rows are how the collector finds them.
_GONE = text(
    "DELETE FROM sessions s WHERE s.id = :id AND NOT EXISTS "
    "(SELECT 1 FROM sandboxes b WHERE b.session_id = s.id AND b.state <> 'destroyed')"
)
_SANDBOXES = text(
    "DELETE FROM sandboxes b WHERE b.session_id = :id AND b.state = 'destroyed' AND NOT EXISTS "
    "(SELECT 1 FROM sandboxes n WHERE n.session_id = :id AND n.state <> 'destroyed')"
)


async def erase_deleted(db: Database) -> int:
    """Look once: remove what deleted sessions left behind. Returns how many sessions were looked at."""
    async with db.transaction() as tx:
        session_ids = [row.id for row in await tx.execute(_DELETED, {"limit": SESSIONS_AT_ONCE})]
    for session_id in session_ids:
        while await _erase_chunk(db, session_id) == CHUNK_ROWS:
            pass
        async with db.transaction() as tx:
            for statement in _REST:
                await tx.execute(statement, {"id": session_id})
            await tx.execute(_SANDBOXES, {"id": session_id})
            await tx.execute(_GONE, {"id": session_id})
    return len(session_ids)


async def _erase_chunk(db: Database, session_id: str) -> int:
    async with db.transaction() as tx:
        await tx.execute(_ALLOW)
        return (await tx.execute(_CHUNK, {"id": session_id, "limit": CHUNK_ROWS})).rowcount
