"""Frames: how host and runner, and the runner and its file children, talk.

A frame is u32 header length, u32 body length, a JSON header, raw bytes. A message is one frame, or one
followed by `data` frames of the same stream; every frame but the last carries `more: true`. Streams are
numbered by the client and share a connection. A sender may have `WINDOW_BYTES` of bodies under way on a
stream; the receiver returns credit as it consumes, so one slow stream never holds up the others.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

VERSION = 1
HEADER_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 1024 * 1024
WINDOW_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 256 * 1024

PREFIX = struct.Struct(">II")

Header = dict[str, Any]


class FrameError(Exception):
    """The peer broke the protocol, or its connection ended inside a frame."""


def encode(header: Header, body: bytes = b"") -> bytes:
    """Return one frame."""
    raw = json.dumps(header, separators=(",", ":")).encode()
    if len(raw) > HEADER_BYTES_MAX or len(body) > BODY_BYTES_MAX:
        raise FrameError(f"frame too large: header {len(raw)}, body {len(body)} bytes")
    return PREFIX.pack(len(raw), len(body)) + raw + body


def lengths(prefix: bytes) -> tuple[int, int]:
    """Return header and body length of a frame from its first eight bytes."""
    header_length, body_length = PREFIX.unpack(prefix)
    if header_length > HEADER_BYTES_MAX or body_length > BODY_BYTES_MAX:
        raise FrameError(f"frame too large: header {header_length}, body {body_length} bytes")
    return header_length, body_length


def decode_header(raw: bytes) -> Header:
    """Parse a header."""
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise FrameError("header is not JSON") from error
    if not isinstance(header, dict):
        raise FrameError("header is not an object")
    return header  # pyright: ignore[reportUnknownVariableType]


def split(header: Header, body: bytes) -> Iterator[tuple[Header, bytes]]:
    """Yield the frames of a message whose whole body is at hand."""
    first, offset = True, 0
    while first or offset < len(body):
        chunk = body[offset : offset + CHUNK_BYTES]
        offset += len(chunk)
        frame: Header = dict(header) if first else {"op": "data", "stream": header.get("stream", 0)}
        if offset < len(body):
            frame["more"] = True
        yield frame, chunk
        first = False


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes from a blocking socket."""
    parts: list[bytes] = []
    missing = size
    while missing:
        part = sock.recv(min(missing, 1 << 20))
        if not part:
            raise FrameError("connection ended")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def receive(sock: socket.socket) -> tuple[Header, bytes]:
    """Read one frame from a blocking socket."""
    header_length, body_length = lengths(receive_exactly(sock, PREFIX.size))
    header = decode_header(receive_exactly(sock, header_length))
    return header, receive_exactly(sock, body_length)


def send_message(sock: socket.socket, header: Header, body: bytes = b"") -> None:
    """Write a whole message to a blocking socket."""
    for frame, chunk in split(header, body):
        sock.sendall(encode(frame, chunk))
