"""Telling every api process that rights changed, at the very instant they do."""

import orjson
from sqlalchemy import text

from managed_agents.db.engine import Tx
from managed_agents.db.listener import KEYS_CHANNEL

_NOTIFY = text("SELECT pg_notify(:channel, :ids)")


async def ring(tx: Tx, *ids: str) -> None:
    """Ring for keys or workspaces when `tx` commits.

    Other rings are sent after the commit, because `NOTIFY` serialises commits and appends are many. Changes of rights are few,
    and here a commit that nobody hears of would be worse than one that waits.
    """
    await tx.execute(_NOTIFY, {"channel": KEYS_CHANNEL, "ids": orjson.dumps(ids).decode()})
