"""Server-sent events from chunks of bytes, with bounds.

The SDK's own decoder works line by line in Python with JSON through the standard library; this one splits
in C and is what keeps the client's share of a response small. Comments, `id` and `retry` are not used by
the Messages API and are dropped.
"""

from dataclasses import dataclass, field

EVENT_BYTES_MAX = 32 * 1024 * 1024


class EventTooLarge(Exception):
    """One event is larger than `EVENT_BYTES_MAX`."""


@dataclass(slots=True)
class SseParser:
    """Feed it chunks in order; it returns the events they complete."""

    _rest: list[bytes] = field(default_factory=lambda: [])
    _bytes: int = 0
    _event: bytes = b""
    _data: list[bytes] = field(default_factory=lambda: [])

    def feed(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        """Return `(event, data)` for every event that `chunk` completes. Raises: EventTooLarge."""
        self._bytes += len(chunk)
        if self._bytes > EVENT_BYTES_MAX:
            raise EventTooLarge(self._bytes)
        if b"\n" not in chunk:
            self._rest.append(chunk)
            return []
        lines = b"".join((*self._rest, chunk)).split(b"\n")
        self._rest = [lines.pop()]
        events: list[tuple[bytes, bytes]] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"event:"):
                self._event = line[6:].strip()
            elif not line:
                if self._data:
                    events.append((self._event, b"\n".join(self._data)))
                self._event, self._data = b"", []
        if events:
            self._bytes = len(self._rest[0]) + sum(map(len, self._data))
        return events
