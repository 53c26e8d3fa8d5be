"""Removes bytes that no row refers to, once nobody has referred to them for an hour.

Bytes are stored before the row that refers to them is written. What was put within the last hour is spared, so a reference has
that long to be committed; storing the same bytes again renews the hour, and the store checks it once more when it removes.

What a row referred to is spared for an hour after that too: a backup dumps the database and then reads the blobs, and must find
what its dump names although it was replaced meanwhile (docs/operations/backup-and-upgrade.md). Since when a blob is unreferenced
is remembered here alone: a process that just began has to look for an hour before it removes anything.
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
REMEMBERED_MAX = 50_000  # unreferenced blobs; more of them have their turn when these are gone

References = Callable[[Sequence[str]], Select[str]]
"""Given digests, selects those that some table refers to."""


class BlobCollector:
    """One process's look at one store; any number of them may do the same."""

    def __init__(
        self, db: Database, blobs: BlobStore, references: Sequence[References], *, now: Callable[[], datetime] = clock.now
    ) -> None:
        self._db = db
        self._blobs = blobs
        self._references = references
        self._now = now
        self._unreferenced: dict[str, tuple[datetime, datetime]] = {}  # seen so first, and last

    async def look(self) -> int:
        """Run one round; return how many blobs were removed. Repeating is harmless; what a cancelled round saw counts."""
        before = self._now() - SPARED
        # Whatever was put again since is not listed for an hour: what was not seen for so long may have become another's.
        self._unreferenced = {digest: seen for digest, seen in self._unreferenced.items() if seen[1] >= before}
        removed = 0
        await self._blobs.discard_drafts(before)
        async for batch in self._blobs.list_before(before):
            used = await self._used([ref.sha256 for ref in batch])
            at = self._now()  # not before the reading: whoever saw a reference did so earlier
            for ref in batch:
                first, _ = self._unreferenced.pop(ref.sha256, (at, at))
                if ref.sha256 in used:
                    continue
                if first <= before:
                    removed += await self._blobs.delete(ref, put_before=before)
                elif len(self._unreferenced) < REMEMBERED_MAX:
                    self._unreferenced[ref.sha256] = (first, at)
        if removed:
            log.info("unreferenced blobs removed", extra={"blobs": removed})
        return removed

    async def _used(self, digests: Sequence[str]) -> set[str]:
        used: set[str] = set()
        async with self._db.transaction() as tx:
            for reference in self._references:
                used.update((await tx.execute(reference(digests))).scalars())
        return used
