"""Telling every api process that rights changed, at the very instant they do."""

import orjson
from sqlalchemy import text

from managed_agents.db.engine import Tx, after_commit
from managed_agents.db.listener import KEYS_CHANNEL
from managed_agents.resources.keys.directory import KeyDirectory

_NOTIFY = text("SELECT pg_notify(:channel, :ids)")


async def ring(tx: Tx, *ids: str) -> None:
    """Ring for keys or workspaces when `tx` commits.

    Other rings are sent after the commit, because `NOTIFY` serialises commits and appends are many. Changes of rights are few,
    and here a commit that nobody hears of would be worse than one that waits.
    """
    await tx.execute(_NOTIFY, {"channel": KEYS_CHANNEL, "ids": orjson.dumps(ids).decode()})


def forget(keys: KeyDirectory, *ids: str) -> None:
    """Drop what this process remembers of keys or workspaces, before it answers: who revoked a key may try it at once.

    The ring reaches the other processes moments later.
    """
    after_commit(lambda: keys.forget(ids))
