"""One model request's previews: from the model's stream to chunks, under the ids that the final events will have.

Which blocks become which events is decided here as `response.py` decides it: neighbouring text blocks are one message, blank ones
are nothing. Whether anyone wants to see it is asked beside the request; until the answer is there, chunks wait here, bounded.
"""

from collections.abc import Callable

from managed_agents.core import ids
from managed_agents.eventlog.previews import START, Chunk
from managed_agents.model.events import BlockStarted, ModelEvent, TextDelta

UNDECIDED_CHUNKS_MAX = 500


class Preview:
    """Folds the model's events in order. `push` sends a chunk, or says that it was shed."""

    def __init__(self, session_id: str, thread_id: str, span_seq: int, push: Callable[[Chunk], bool]) -> None:
        self._where = (session_id, thread_id, span_seq)
        self._push = push
        self._wanted: bool | None = None
        self._waiting: list[Chunk] = []
        self._shed: set[str] = set()
        # Index of the block that opened a message or is a thought → id of its event.
        self.event_ids: dict[int, str] = {}
        # The message being written: its event, and how many of its texts were begun. None between messages.
        self._message: str | None = None
        self._texts = 0
        # Of the open text block: what came while it was blank, then how much was sent.
        self._blank: str | None = None
        self._offset = 0

    def decide(self, wanted: bool) -> None:
        """Say whether any stream shows previews of the session."""
        self._wanted = wanted
        waiting, self._waiting = self._waiting, []
        overflowed, self._shed = self._shed, set()
        if wanted:
            for chunk in waiting:
                self._send(chunk)
        self._shed |= overflowed

    def take(self, event: ModelEvent) -> None:
        """Fold one event of the model's stream."""
        if self._wanted is False:
            return
        match event:
            case BlockStarted(index, block):
                self._started(index, block["type"])
                if block["type"] == "text" and block.get("text"):
                    self._text(index, block["text"])
            case TextDelta(index, text):
                self._text(index, text)
            case _:
                pass

    def _started(self, index: int, kind: str) -> None:
        if kind == "text":
            self._blank, self._offset = "", 0
            return
        self._message = None
        if kind in ("thinking", "redacted_thinking"):
            event_id = self.event_ids[index] = ids.new_id(ids.EVENT)
            self._send(Chunk(*self._where, event_id, START, 0, "agent.thinking"))

    def _text(self, index: int, text: str) -> None:
        if self._blank is not None:
            text = self._blank + text
            if not text.strip():
                self._blank = text
                return
            self._blank = None
            if self._message is None:
                self._message = self.event_ids[index] = ids.new_id(ids.EVENT)
                self._texts = 0
                self._send(Chunk(*self._where, self._message, START, 0, "agent.message"))
            self._texts += 1
        if self._message is not None and text:
            self._send(Chunk(*self._where, self._message, self._texts - 1, self._offset, text))
            self._offset += len(text)

    def _send(self, chunk: Chunk) -> None:
        if chunk.event_id in self._shed:
            return
        if self._wanted is None:
            if len(self._waiting) < UNDECIDED_CHUNKS_MAX:
                self._waiting.append(chunk)
                return
        elif self._push(chunk):
            return
        self._shed.add(chunk.event_id)
