"""Fan-out: from committed rows to the subscribers of this process.

For each session with subscribers there is one `Channel` that holds the newest rows as ready-made SSE frames, encoded once
and shared. Rows committed in this process are handed to it directly; a doorbell or the poll makes it read the table, once for
all its subscribers. A subscriber delivers only `seq = cursor + 1`, so a lost ring or a hole costs time, never an event: what
is not in the channel any more is read from the table.

The null copy of a queued event (`processed_at: null`) is best effort: it is shown until the logged one takes its place. So are
previews: each opted-in stream has a feed of its own (`preview_feed.py`), filled from notifications, emptied between events.
"""

import logging
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import anyio

from managed_agents.core import clock, ids, limits
from managed_agents.core.logs import Trouble
from managed_agents.db.direct import Statement
from managed_agents.db.engine import Database
from managed_agents.eventlog import read
from managed_agents.eventlog.events import QueuedEvent, StoredEvent, with_processed_at
from managed_agents.eventlog.preview_feed import PreviewFeed
from managed_agents.eventlog.previews import TYPES as PREVIEWED_TYPES
from managed_agents.eventlog.previews import unpacked

logger = logging.getLogger(__name__)

READ_ROWS = 500
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_ENDING = "session.status_terminated"
_REQUEST_END = "span.model_request_end"

_HEADS = Statement(
    "SELECT id, last_seq, last_inbox_seq, deleted_at IS NOT NULL FROM sessions WHERE id = ANY(CAST(:ids AS text[]))"
)


def frame(event_type: str, body: bytes) -> bytes:
    """One SSE frame. The SDK discards frames without `event:`."""
    return b"event: %b\ndata: %b\n\n" % (event_type.encode(), body)


@dataclass(frozen=True, slots=True)
class _Entry:
    seq: int
    thread_id: str
    ends: bool
    frame: bytes
    # Closes a preview: the event's own id, or "" for the end of a whole model request.
    closes: str | None = None


def _entry(row: StoredEvent) -> _Entry:
    closes = row.id if row.type in PREVIEWED_TYPES else "" if row.type == _REQUEST_END else None
    return _Entry(row.seq, row.thread_id, row.type == _ENDING, frame(row.type, row.body), closes)


@dataclass(slots=True)
class Channel:
    """The newest rows of one session, contiguous, for all its subscribers here."""

    session_id: str
    tail: int
    inbox_tail: int
    entries: deque[_Entry] = field(default_factory=deque[_Entry])
    copies: dict[str, tuple[int, str, bytes]] = field(default_factory=dict[str, tuple[int, str, bytes]])
    behind: bool = False
    deleted: bool = False
    subscribers: int = 0
    feeds: list[PreviewFeed] = field(default_factory=list[PreviewFeed])
    changed: anyio.Event = field(default_factory=anyio.Event)

    def add(self, rows: Iterable[StoredEvent]) -> None:
        """Take rows in `seq` order; a hole is left to the reader."""
        for row in rows:
            if row.seq <= self.tail:
                continue
            if row.seq != self.tail + 1:
                self.behind = True
                break
            self.tail = row.seq
            self.copies.pop(row.id, None)
            self.entries.append(_entry(row))
            if len(self.entries) > limits.SUBSCRIBER_BUFFER_EVENTS_MAX:
                self.entries.popleft()
        self.wake()

    def add_copies(self, rows: Iterable[QueuedEvent]) -> None:
        """Take the null copies of queued events."""
        for row in rows:
            if row.inbox_seq > self.inbox_tail:
                self.inbox_tail = row.inbox_seq
                self.copies[row.id] = (
                    row.inbox_seq,
                    row.thread_id,
                    frame(row.type, with_processed_at(row.payload, None)),
                )
        self.wake()

    def wake(self) -> None:
        """Let every subscriber look again."""
        self.changed.set()
        self.changed = anyio.Event()


class Hub:
    """All channels of this process. `run()` must be alive for rows of other processes to arrive."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._channels: dict[str, Channel] = {}
        self._dirty: set[str] = set()
        self._wake = anyio.Event()
        self._closing = False

    @property
    def subscribers(self) -> int:
        """Open subscriptions, for the metrics."""
        return sum(channel.subscribers for channel in self._channels.values())

    def publish(self, rows: Iterable[StoredEvent]) -> None:
        """Hand over rows that this process has committed. Never waits."""
        for row in rows:
            if (channel := self._channels.get(row.session_id)) is not None:
                channel.add([row])
                if channel.behind:
                    self.refresh([row.session_id])

    def publish_queued(self, rows: Iterable[QueuedEvent]) -> None:
        """Hand over queued events that this process has committed. Never waits."""
        for row in rows:
            if (channel := self._channels.get(row.session_id)) is not None:
                channel.add_copies([row])

    def publish_previews(self, items: Iterable[Any]) -> None:
        """Hand over the chunks of one notification. Never waits."""
        fed: set[str] = set()
        for chunk in unpacked(items):
            channel = self._channels.get(chunk.session_id)
            if channel is not None and channel.feeds:
                encoded = chunk.frame()
                for feed in channel.feeds:
                    feed.offer(chunk, encoded)
                fed.add(chunk.session_id)
        for session_id in fed:
            self._channels[session_id].wake()

    def previewed(self) -> Collection[str]:
        """Sessions with opted-in streams here."""
        return [channel.session_id for channel in self._channels.values() if channel.feeds]

    def refresh(self, session_ids: Iterable[str]) -> None:
        """Note that these sessions may have new rows (doorbell). Never waits."""
        news = self._channels.keys() & set(session_ids)
        if news:
            self._dirty |= news
            self._wake.set()

    async def refresh_all(self) -> None:
        """Look at every channel: after a reconnection, and for the poll."""
        self.refresh(list(self._channels))

    def close(self) -> None:
        """End every stream: the process is shutting down."""
        self._closing = True
        for channel in self._channels.values():
            channel.wake()

    async def run(self) -> None:
        """Read for the channels until cancelled: on a ring, and for all of them every `POLL_SECONDS`, whatever rang meanwhile."""
        trouble = Trouble(logger)
        polled_at = anyio.current_time()
        while True:
            with anyio.move_on_after(limits.POLL_SECONDS):
                await self._wake.wait()
            self._wake = anyio.Event()
            dirty, self._dirty = self._dirty, set()
            if anyio.current_time() >= polled_at + limits.POLL_SECONDS:
                dirty = set(self._channels)
                polled_at = anyio.current_time()
            if not dirty:
                continue
            try:
                with anyio.fail_after(limits.DATABASE_STATEMENT_SECONDS):
                    await self._read(dirty)
                trouble.over("reading for streams works again")
            except Exception as error:  # noqa: BLE001  # supervisor: whatever it was, the next poll tries again
                trouble.report("reading for %d streams failed: %s: %s", len(dirty), type(error).__name__, error)
                await anyio.sleep(limits.POLL_SECONDS)

    async def _read(self, session_ids: set[str]) -> None:
        channels = {sid: channel for sid in session_ids if (channel := self._channels.get(sid)) is not None}
        if not channels:
            return
        async with self._db.autocommit() as tx:
            heads = await _HEADS.rows(tx, {"ids": list(channels)})
            for session_id, last_seq, last_inbox_seq, _ in heads:
                channel = channels[session_id]
                if last_inbox_seq > channel.inbox_tail:
                    channel.add_copies(await read.inbox_after(tx, session_id, channel.inbox_tail))
                while channel.tail < last_seq:
                    rows = await read.public_after(tx, session_id, channel.tail, limit=READ_ROWS)
                    if not rows:
                        break
                    channel.add(rows)
                channel.behind = False
        # The eraser may have been faster than the ring: a row that is not there any more was deleted too.
        for session_id in channels.keys() - {session_id for session_id, _, _, deleted in heads if not deleted}:
            channels[session_id].deleted = True
            channels[session_id].wake()

    async def subscribe(
        self, session_id: str, thread_id: str, *, seq: int, inbox_seq: int, previews: frozenset[str] = frozenset()
    ) -> AsyncGenerator[bytes, None]:
        """Frames of `thread_id` past the two cursors, several at once where they wait; a ping after each silence.

        `previews` names the types of events to preview; interest in them must be registered before `seq` was read. Ends after
        deletion (with `session.deleted`), termination or shutdown. Holds no connection while it waits.
        """
        channel = self._channels.get(session_id)
        if channel is None:
            channel = self._channels[session_id] = Channel(session_id, seq, inbox_seq)
        channel.subscribers += 1
        feed = PreviewFeed(previews, thread_id, seq) if previews else None
        if feed is not None:
            channel.feeds.append(feed)
        try:
            # Rows between the cursors and now may have been committed elsewhere without a ring heard here.
            self.refresh([session_id])
            async for chunk in self._deliver(channel, thread_id, seq, inbox_seq, feed):
                yield chunk
        finally:
            channel.subscribers -= 1
            if feed is not None:
                channel.feeds.remove(feed)
            if channel.subscribers == 0:
                self._channels.pop(session_id, None)

    async def _deliver(
        self, channel: Channel, thread_id: str, cursor: int, inbox_cursor: int, feed: PreviewFeed | None
    ) -> AsyncGenerator[bytes, None]:
        while True:
            changed = channel.changed
            chunks: list[bytes] = []
            for copy_seq, copy_thread, copy_frame in list(channel.copies.values()):
                if copy_seq > inbox_cursor:
                    inbox_cursor = copy_seq
                    if copy_thread == thread_id:
                        chunks.append(copy_frame)
            entries = await self._entries_after(channel, cursor)
            ended = False
            for entry in entries:
                assert entry.seq == cursor + 1, "a stream never skips an event"
                cursor = entry.seq
                if entry.thread_id == thread_id:
                    chunks.append(entry.frame)
                    if feed is not None and entry.closes is not None:
                        if entry.closes:
                            feed.finish(entry.closes)
                        else:
                            feed.end_request(entry.seq)
                # The end of the session, which is told on its primary thread, ends the streams of all threads.
                ended = ended or entry.ends
            # Only behind the events: a preview never follows what it is a preview of.
            if feed is not None:
                chunks += feed.take(cursor)
            if chunks:
                yield b"".join(chunks)
            if channel.deleted:
                yield _deleted_frame()
                return
            if ended or self._closing:
                return
            if cursor < channel.tail or chunks:
                continue
            with anyio.move_on_after(limits.STREAM_HEARTBEAT_SECONDS) as silence:
                await changed.wait()
            if silence.cancelled_caught:
                yield PING

    async def _entries_after(self, channel: Channel, cursor: int) -> list[_Entry]:
        if cursor >= channel.tail:
            return []
        if channel.entries and channel.entries[0].seq <= cursor + 1:
            first = cursor + 1 - channel.entries[0].seq
            return [channel.entries[index] for index in range(first, len(channel.entries))]
        # A slow reader, or one whose cursor is older than the channel: the table has everything.
        with anyio.fail_after(limits.DATABASE_STATEMENT_SECONDS):
            async with self._db.autocommit() as tx:
                rows = await read.public_after(tx, channel.session_id, cursor, limit=READ_ROWS)
        return [_entry(row) for row in rows]


def _deleted_frame() -> bytes:
    # Stream only, never stored: the log it would be in is gone. spec: beta_managed_agents_session_deleted_event.py
    event_id = ids.new_id(ids.EVENT)
    return frame(
        "session.deleted",
        b'{"type":"session.deleted","id":"%b","processed_at":"%b"}' % (event_id.encode(), clock.micros(clock.now()).encode()),
    )
