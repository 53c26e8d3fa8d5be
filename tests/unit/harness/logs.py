"""Logs written by hand, for the pure parts of the harness."""

from collections.abc import Iterable

import orjson

from managed_agents.eventlog.events import NewEvent, QueuedEvent, StoredEvent, with_processed_at


def stored(events: Iterable[NewEvent]) -> list[StoredEvent]:
    """Events as the log would hold them."""
    return [
        StoredEvent(
            "sesn_1",
            seq,
            event.id,
            event.thread_id,
            event.type,
            with_processed_at(event.payload or b'{"type":"session.usage"}', "2026-11-01T00:00:00.000001Z"),
            event.private,
            event.for_model,
        )
        for seq, event in enumerate(events, 1)
    ]


def queued(event_type: str, event_id: str, text: str = "hello", *, inbox_seq: int = 1) -> QueuedEvent:
    """A client event that waits."""
    payload = {"type": event_type, "id": event_id, "content": [{"type": "text", "text": text}]}
    return QueuedEvent("sesn_1", inbox_seq, event_id, "sthr_1", event_type, orjson.dumps(payload))
