"""Multipart bodies, parsed as they stream in: at no time is more of a part in memory than its headers and what arrived last.

`parts` yields each part in turn; its `data` must be read to the end before the next one is asked for.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from managed_agents.core.errors import InvalidRequest
from managed_agents.web import body, intake

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PARTS_MAX = 32
PART_HEADERS_MAX = 8
PART_HEADER_BYTES_MAX = 4096  # of one line
OVERHEAD_BYTES_MAX = 1024 * 1024  # boundaries, headers and small fields beside the payload


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the form."""

    name: str
    filename: str | None
    content_type: str | None
    data: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class _Headers:
    name: str
    filename: str | None
    content_type: str | None


class _End:
    """The end of a part."""


_Event = _Headers | bytes | _End


class _Collector:
    """Callbacks of the push parser; keeps what they tell until it is drained after each chunk."""

    def __init__(self, boundary: bytes) -> None:
        self.events: list[_Event] = []
        self.complete = False
        self._field = bytearray()
        self._value = bytearray()
        self._headers: dict[str, bytes] = {}
        self._parts = 0
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._part_begin,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": self._finished,
        }
        self._parser = MultipartParser(
            boundary, callbacks, max_header_count=PART_HEADERS_MAX, max_header_size=PART_HEADER_BYTES_MAX
        )

    def feed(self, chunk: bytes) -> list[_Event]:
        """Parse one chunk and return what it completed."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest("body: malformed multipart form") from error
        events, self.events = self.events, []
        return events

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > PARTS_MAX:
            raise InvalidRequest(f"body: more than {PARTS_MAX} parts")
        self._headers = {}

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self.events.append(data[start:end])

    def _part_end(self) -> None:
        self.events.append(_End())

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._field.decode("latin-1").lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get("content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequest("body: a part of the form has no name")
        filename = options.get(b"filename")
        content_type = self._headers.get("content-type")
        self.events.append(
            _Headers(
                _decoded(options[b"name"], "body: name of a part"),
                None if filename is None else _decoded(filename, "file: filename"),
                None if content_type is None else content_type.decode("latin-1"),
            )
        )

    def _finished(self) -> None:
        self.complete = True


def _decoded(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{what}: not valid UTF-8") from error


async def parts(request: Request, bytes_max: int) -> AsyncGenerator[Part]:
    """Yield the parts of the form. Raises `InvalidRequest` for another kind of body, `TooLarge` above
    `bytes_max`.
    """
    body.check_encoding(request)
    body.check_length(request, bytes_max + OVERHEAD_BYTES_MAX)
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise InvalidRequest("content-type: must be multipart/form-data")
    if not options.get(b"boundary"):
        raise InvalidRequest("content-type: multipart boundary is missing")
    async with aclosing(_events(request, options[b"boundary"], bytes_max)) as events:
        async for event in events:
            assert isinstance(event, _Headers), "the data of a part must be read before the next part"
            yield Part(event.name, event.filename, event.content_type, _data(events))


async def _data(events: AsyncIterator[_Event]) -> AsyncIterator[bytes]:
    async for event in events:
        if isinstance(event, _End):
            return
        assert isinstance(event, bytes)
        yield event


async def _events(request: Request, boundary: bytes, bytes_max: int) -> AsyncGenerator[_Event]:
    try:
        collector = _Collector(boundary)
    except FormParserError as error:
        raise InvalidRequest("content-type: multipart boundary is too long") from error
    total = 0
    async for chunk in intake.chunks(request):
        total += len(chunk)
        if total > bytes_max + OVERHEAD_BYTES_MAX:
            raise body.too_large(bytes_max)
        for event in collector.feed(chunk):
            yield event
    if not collector.complete:
        raise InvalidRequest("body: the multipart form ends too early")
