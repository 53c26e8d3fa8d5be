"""Previews on their way from the worker that hears the model to every process with an opted-in stream.

A preview is never stored and never waited for. It travels as notifications on a channel and a connection of its own, so that it
can delay neither doorbells nor appends. A chunk says where it belongs (event, index, offset), so a receiver can tell a hole and
stop (`preview_feed.py`); what is too much for the sender is shed, and then nothing more is sent for that event: what clients
have seen stays a prefix of the final text.
"""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import anyio
import orjson

from managed_agents.core import limits
from managed_agents.core.logs import Trouble
from managed_agents.db.connection import TROUBLE, connect
from managed_agents.db.listener import PAYLOAD_BYTES_MAX, RECONNECT_SECONDS

logger = logging.getLogger(__name__)

PREVIEW_CHANNEL = "managed_agents_previews"
TYPES = frozenset({"agent.message", "agent.thinking"})  # spec: beta_managed_agents_delta_type.py
COALESCE_SECONDS = 0.03
PENDING_CHARS_MAX = 256 * 1024  # of one process; beyond it previews are shed
CHUNK_CHARS_MAX = 1000  # at six bytes a character (an escaped control character) it fits into a payload
START = -1


class Chunk(NamedTuple):
    """A piece of a preview. Block `START`: the preview begins, and `text` is the event's type.

    `span_seq` is the log position of the model request's start: what says which streams were open before it.
    """

    session_id: str
    thread_id: str
    span_seq: int
    event_id: str
    block: int
    offset: int
    text: str

    def frame(self) -> bytes:
        """The SSE frame clients get. spec: beta_managed_agents_start_event.py, beta_managed_agents_delta_event.py"""
        if self.block == START:
            body = orjson.dumps({"type": "event_start", "event": {"type": self.text, "id": self.event_id}})
            return b"event: event_start\ndata: %b\n\n" % body
        content = {"type": "text", "text": self.text}
        delta = {"type": "content_delta", "index": self.block, "content": content}
        body = orjson.dumps({"type": "event_delta", "event_id": self.event_id, "delta": delta})
        return b"event: event_delta\ndata: %b\n\n" % body


def payloads(chunks: Iterable[Chunk]) -> list[str]:
    """Pack chunks into notifications, in order."""
    packed: list[str] = []
    items: list[bytes] = []
    size = 2
    for chunk in chunks:
        item = orjson.dumps(list(chunk))
        if items and size + len(item) + 1 > PAYLOAD_BYTES_MAX:
            packed.append((b"[%b]" % b",".join(items)).decode())
            items, size = [], 2
        items.append(item)
        size += len(item) + 1
    if items:
        packed.append((b"[%b]" % b",".join(items)).decode())
    return packed


def unpacked(items: Iterable[Any]) -> list[Chunk]:
    """Read what `payloads` packed."""
    return [Chunk(*item) for item in items]


class PreviewSender:
    """Sends the previews of one worker, coalesced."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._pending: dict[str, list[Chunk]] = {}
        self._chars = 0
        self._wake = anyio.Event()

    def push(self, chunk: Chunk) -> bool:
        """Take a chunk to be sent soon; False when it was shed, and nothing may follow for its event. Never waits."""
        if self._chars + len(chunk.text) > PENDING_CHARS_MAX:
            return False
        waiting = self._pending.setdefault(chunk.event_id, [])
        self._chars += len(chunk.text)
        if waiting and waiting[-1].block == chunk.block and len(waiting[-1].text) + len(chunk.text) <= CHUNK_CHARS_MAX:
            waiting[-1] = waiting[-1]._replace(text=waiting[-1].text + chunk.text)
        else:
            waiting += _cut(chunk)
        self._wake.set()
        return True

    async def run(self) -> None:
        """Send until cancelled, reconnecting for ever."""
        trouble = Trouble(logger)
        while True:
            try:
                connection = await connect(self._database_url)
                trouble.over("preview connection is back")
                try:
                    await self._send_forever(connection)
                finally:
                    connection.terminate()
            except TROUBLE as error:
                trouble.report("preview connection lost: %s", str(error) or type(error).__name__)
            await anyio.sleep(RECONNECT_SECONDS)

    async def _send_forever(self, connection: Any) -> None:
        while True:
            await self._wake.wait()
            await anyio.sleep(COALESCE_SECONDS)
            self._wake = anyio.Event()
            pending, self._pending, self._chars = self._pending, {}, 0
            await connection.execute(
                "SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload",
                PREVIEW_CHANNEL,
                payloads(chunk for chunks in pending.values() for chunk in chunks),
                timeout=limits.DATABASE_STATEMENT_SECONDS,
            )


def _cut(chunk: Chunk) -> list[Chunk]:
    if len(chunk.text) <= CHUNK_CHARS_MAX:
        return [chunk]
    return [
        chunk._replace(offset=chunk.offset + at, text=chunk.text[at : at + CHUNK_CHARS_MAX])
        for at in range(0, len(chunk.text), CHUNK_CHARS_MAX)
    ]
