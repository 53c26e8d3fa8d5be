"""Who wants previews: rows that say which sessions have an opted-in stream somewhere, each with an expiry.

A process registers before it opens such a stream and again while it is open; a worker asks once for each model request, after the
request's start is in the log. So a stream that was open before that start is always seen. Nothing is taken back when a
stream closes: it expires.
"""

import logging
from collections.abc import Callable, Collection

import anyio
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.core import limits
from managed_agents.db.direct import Statement
from managed_agents.db.engine import Database, Tx

logger = logging.getLogger(__name__)

EXPIRY_SECONDS = 45.0
REFRESH_SECONDS = 15.0

_REGISTER = text(
    "INSERT INTO preview_interests (session_id, expires_at) "
    "SELECT id, clock_timestamp() + make_interval(secs => :expiry) FROM unnest(CAST(:ids AS text[])) AS id ORDER BY id "
    "ON CONFLICT (session_id) DO UPDATE SET expires_at = excluded.expires_at"
)
_FORGET = text("DELETE FROM preview_interests WHERE expires_at < clock_timestamp()")
_WANTED = Statement("SELECT EXISTS (SELECT 1 FROM preview_interests WHERE session_id = :id AND expires_at >= clock_timestamp())")


async def register(tx: Tx, session_ids: Collection[str]) -> None:
    """Say that these sessions have opted-in streams. Repeating extends it."""
    await tx.execute(_REGISTER, {"ids": list(session_ids), "expiry": EXPIRY_SECONDS})


async def wanted(tx: Tx, session_id: str) -> bool:
    """Whether any stream of the session shows previews."""
    [(found,)] = await _WANTED.rows(tx, {"id": session_id})
    return found


async def keep(db: Database, previewed: Callable[[], Collection[str]]) -> None:
    """Extend the interest of this process's streams until cancelled, and forget what has expired anywhere."""
    while True:
        await anyio.sleep(REFRESH_SECONDS)
        try:
            with anyio.fail_after(limits.DATABASE_STATEMENT_SECONDS):
                async with db.autocommit() as tx:
                    await tx.execute(_FORGET)
                    if session_ids := previewed():
                        await register(tx, session_ids)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            logger.warning("interest in previews not extended: %s: %s", type(error).__name__, error)
