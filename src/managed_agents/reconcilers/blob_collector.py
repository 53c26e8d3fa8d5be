"""Removes bytes that no row refers to.

Bytes are stored before the row that refers to them is written. What was put within the last hour is spared,
so a reference has that long to be committed; storing the same bytes again renews the hour, and the store
checks it once more at the moment of removal.
"""

import logging
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Select

from managed_agents.blobstore.store import BlobStore
from managed_agents.core import clock
from managed_agents.db.engine import Database

log = logging.getLogger(__name__)

SPARED = timedelta(hours=1)

References = Callable[[Sequence[str]], Select[str]]
"""Given digests, selects those that some table refers to."""


async def collect(
    db: Database,
    blobs: BlobStore,
    references: Sequence[References],
    *,
    now: Callable[[], datetime] = clock.now,
) -> int:
    """Run one round; return how many blobs were removed. Repeating is harmless."""
    before = now() - SPARED
    removed = 0
    await blobs.discard_drafts(before)
    async for batch in blobs.list_before(before):
        digests = [ref.sha256 for ref in batch]
        used: set[str] = set()
        async with db.transaction() as tx:
            for reference in references:
                used.update((await tx.execute(reference(digests))).scalars())
        for ref in batch:
            if ref.sha256 not in used and await blobs.delete(ref, put_before=before):
                removed += 1
    if removed:
        log.info("unreferenced blobs removed", extra={"blobs": removed})
    return removed
