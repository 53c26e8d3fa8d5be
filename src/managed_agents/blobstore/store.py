"""The seam to wherever bytes are kept.

A blob is named by the SHA-256 of its content, so storing the same bytes twice costs nothing and a reference
is a plain value. Who uses a blob is a matter of rows in the user's own transaction; the store itself only
keeps bytes. Race: a blob may become unreferenced and be stored anew at the same time, therefore collectors
spare what was written within the last hour (`put` renews that).
"""

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


class BlobMissing(Exception):
    """The store has no such blob."""


class BlobTooLarge(Exception):
    """The stream went beyond `size_max`; nothing was kept."""


class BlobStoreFull(OSError):
    """The store has no room for the stream; nothing was kept, and what is there can be read."""


@dataclass(frozen=True, slots=True)
class BlobRef:
    """Names one blob."""

    sha256: str
    size: int


class BlobStore(Protocol):
    """Keeps bytes; safe to use from several processes at once."""

    async def put(self, stream: AsyncIterable[bytes], size_max: int) -> BlobRef:
        """Store a stream durably. Raises `BlobTooLarge`, `BlobStoreFull`; after these or a cancellation nothing is left
        behind.
        """
        ...

    def open(self, ref: BlobRef, range_: tuple[int, int] | None = None) -> AsyncIterator[bytes]:
        """Yield the content, or its bytes from `range_[0]` up to but excluding `range_[1]`. Raises
        `BlobMissing`.
        """
        ...

    async def delete(self, ref: BlobRef, *, put_before: datetime | None = None) -> bool:
        """Remove a blob, unless it was put at or after `put_before`; say whether it did. Repeating is
        harmless.
        """
        ...

    def list_before(self, instant: datetime) -> AsyncIterator[list[BlobRef]]:
        """Yield batches of blobs last put before `instant`."""
        ...

    async def discard_drafts(self, instant: datetime) -> None:
        """Remove what writers that died before `instant` left behind."""
        ...
