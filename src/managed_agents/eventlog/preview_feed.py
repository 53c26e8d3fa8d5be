"""What one opted-in stream shows of previews. Pure.

Invariant, whatever arrives late, twice or not at all: one start for an event; its deltas are a prefix of the final text, without
holes and with indexes in order; nothing after the event itself or after the end of its model request; nothing of a request that
began before the stream did.
"""

from collections import deque
from collections.abc import Callable

from managed_agents.eventlog.previews import START, Chunk

PENDING_BYTES_MAX = 256 * 1024  # of one stream; a reader that is further behind gets no more of that event


class PreviewFeed:
    """Chunks of one thread for one stream, until the stream takes them."""

    def __init__(self, types: frozenset[str], thread_id: str, opened_seq: int) -> None:
        self._types = types
        self._thread_id = thread_id
        # Requests that began here or before are not shown: the stream came too late for them, or they are over.
        self._over_seq = opened_seq
        # Events being previewed → index and offset of the next character. One that is shed leaves this map.
        self._showing: dict[str, tuple[int, int]] = {}
        self._finished: set[str] = set()
        self._pending: deque[tuple[int, str, bytes]] = deque()
        self._bytes = 0

    def offer(self, chunk: Chunk, frame: bytes) -> None:
        """Take a chunk, or drop it."""
        if chunk.thread_id != self._thread_id or chunk.span_seq <= self._over_seq:
            return
        event_id = chunk.event_id
        if chunk.block == START:
            if chunk.text not in self._types or event_id in self._showing or event_id in self._finished:
                return
            following = (0, 0)
        else:
            if (expected := self._showing.get(event_id)) is None:
                return
            next_index = (expected[0] + 1, 0) if expected[1] else expected
            if (chunk.block, chunk.offset) not in (expected, next_index):
                self._drop(event_id)
                return
            following = (chunk.block, chunk.offset + len(chunk.text))
        if self._bytes + len(frame) > PENDING_BYTES_MAX:
            self._drop(event_id)
            return
        self._showing[event_id] = following
        self._pending.append((chunk.span_seq, event_id, frame))
        self._bytes += len(frame)

    def _drop(self, event_id: str) -> None:
        self._showing.pop(event_id, None)
        self._finished.add(event_id)

    def finish(self, event_id: str) -> None:
        """The event itself is delivered now: nothing may follow for it."""
        self._drop(event_id)
        self._keep(lambda item: item[1] != event_id)

    def end_request(self, seq: int) -> None:
        """The model request that ran until `seq` is over, with or without events."""
        self._over_seq = seq
        self._showing.clear()
        self._finished.clear()
        self._keep(lambda item: item[0] > seq)

    def _keep(self, wanted: Callable[[tuple[int, str, bytes]], bool]) -> None:
        kept = [item for item in self._pending if wanted(item)]
        self._pending = deque(kept)
        self._bytes = sum(len(item[2]) for item in kept)

    def take(self, cursor: int) -> list[bytes]:
        """What the stream may show after it has delivered event `cursor`: nothing before the request's own start."""
        taken: list[bytes] = []
        while self._pending and self._pending[0][0] <= cursor:
            frame = self._pending.popleft()[2]
            self._bytes -= len(frame)
            taken.append(frame)
        return taken
