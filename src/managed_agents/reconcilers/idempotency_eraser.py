"""Removes expired idempotency keys, in chunks, so that no transaction is long. What is left expired is taken over anyway."""

from sqlalchemy import text

from managed_agents.core import limits
from managed_agents.db.engine import Database

CHUNK_ROWS = 1000

_CHUNK = text(
    "DELETE FROM idempotency_keys WHERE (workspace_id, key) IN (SELECT workspace_id, key FROM idempotency_keys "
    "WHERE created_at < clock_timestamp() - make_interval(secs => :seconds) ORDER BY created_at LIMIT :limit "
    "FOR UPDATE SKIP LOCKED)"
)


async def erase_expired(db: Database, *, chunk: int = CHUNK_ROWS) -> int:
    """Look once: remove every expired key. Returns how many there were. Safe to run anywhere and twice."""
    removed = 0
    while True:
        async with db.transaction() as tx:
            gone = (await tx.execute(_CHUNK, {"seconds": float(limits.IDEMPOTENCY_SECONDS), "limit": chunk})).rowcount
        removed += gone
        if gone < chunk:
            return removed
