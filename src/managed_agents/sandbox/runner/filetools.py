"""read, write and edit. Runs in a child with the commands' uid."""

from __future__ import annotations

import base64
import json
import os
import stat
from typing import IO, Any, cast

from .config import Config
from .toolerror import ToolError, reason

# spec: limits of the SDK's reference implementation for self-hosted workers.
TEXT_BYTES_MAX = 256 * 1024
IMAGE_BASE64_BYTES_MAX = 5 * 1024 * 1024
PDF_BYTES_MAX = 20 * 1024 * 1024
EDIT_BYTES_MAX = 64 * 1024 * 1024
NOTEBOOK_BYTES_MAX = 20 * 1024 * 1024

_IMAGES = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    "gif": "image/gif",
    "webp": "image/webp",
}
_SIGNATURES = {
    "image/jpeg": (b"\xff\xd8\xff",),
    "image/png": (b"\x89PNG\r\n\x1a\n",),
    "image/gif": (b"GIF87a", b"GIF89a"),
    "image/webp": (b"RIFF",),
}

Block = dict[str, Any]


def text_block(text: str) -> list[Block]:
    """Return content of one text block."""
    return [{"type": "text", "text": text}]


def string(tool: str, arguments: dict[str, Any], name: str) -> str:
    """Return the string argument `name`."""
    value = arguments.get(name)
    if not isinstance(value, str):
        raise ToolError(f"{tool}: {name} is required and must be a string")
    if "\0" in value and name in ("file_path", "path", "pattern"):
        raise ToolError(f"{tool}: {name} contains a NUL character")
    return value


def open_regular(tool: str, shown: str, path: str, flags: int) -> int:
    """Open `path` if it is a regular file. Never blocks on a FIFO or a device."""
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ToolError(f"{tool}: {shown}: {reason(error)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ToolError(f"{tool}: {shown}: not a regular file")
    return fd


def _range(arguments: dict[str, Any]) -> tuple[int, int] | None:
    given = arguments.get("view_range")
    if given is None:
        return None
    items = cast("list[object]", given) if isinstance(given, list) else []
    if len(items) != 2 or not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise ToolError("read: view_range must be [start_line, end_line]")
    start, end = cast("tuple[int, int]", tuple(items))
    if start < 1 or (0 < end < start):
        raise ToolError("read: view_range starts at line 1 and must not end before it starts")
    return start, end


def _lines(file: IO[bytes], shown: str, start: int, end: int) -> bytes:
    taken: list[bytes] = []
    size = number = 0
    # A bounded readline: one endless line must not fill the memory.
    for line in iter(lambda: file.readline(TEXT_BYTES_MAX + 1), b""):
        number += 1
        if number < start:
            continue
        size += len(line)
        if size > TEXT_BYTES_MAX:
            raise ToolError(f"read: view_range of {shown} exceeds {TEXT_BYTES_MAX} bytes; ask for fewer lines")
        taken.append(line)
        if number == end:
            break
    if not taken and start > max(number, 1):
        raise ToolError(f"read: {shown} has {number} lines; view_range starts at {start}")
    return b"".join(taken)


def _media(file: IO[bytes], shown: str, size: int, media_type: str) -> list[Block]:
    limit = PDF_BYTES_MAX if media_type == "application/pdf" else IMAGE_BASE64_BYTES_MAX * 3 // 4
    if size > limit:
        raise ToolError(f"read: {shown} is {size} bytes; at most {limit} bytes of this type can be read")
    data = file.read(limit)
    valid = data.startswith(_SIGNATURES.get(media_type, (b"%PDF-",)))
    # RIFF is a container of sounds and films too.
    if not valid or (media_type == "image/webp" and data[8:12] != b"WEBP"):
        # The model API would refuse such a block, and with it every later request of the session.
        raise ToolError(f"read: {shown} is not valid {media_type}")
    source = {"type": "base64", "media_type": media_type, "data": base64.b64encode(data).decode()}
    return [{"type": "document" if media_type == "application/pdf" else "image", "source": source}]


def _joined(value: object) -> str:
    return "".join(str(part) for part in cast("list[object]", value)) if isinstance(value, list) else str(value)


def render_notebook(raw: bytes) -> str:
    """Return cells and their text outputs."""
    notebook: Any = json.loads(raw)
    parts: list[str] = []
    for number, cell in enumerate(notebook["cells"], 1):
        parts.append(f"# Cell {number} [{cell.get('cell_type', 'code')}]\n{_joined(cell.get('source', ''))}")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = output.get("text") or data.get("text/plain") or output.get("traceback")
            if text:
                parts.append(f"# Output of cell {number}\n{_joined(text)}")
            parts.extend(f"# Output of cell {number}: {kind}" for kind in data if kind.startswith("image/"))
    return "\n\n".join(parts)


def read(arguments: dict[str, Any], config: Config) -> list[Block]:
    """Return a file as text, image or document."""
    shown = string("read", arguments, "file_path")
    view = _range(arguments)
    path = config.resolve(shown)
    fd = open_regular("read", shown, path, os.O_RDONLY)
    extension = path.rpartition(".")[2].lower() if "." in path else ""
    media_type = "application/pdf" if extension == "pdf" else _IMAGES.get(extension)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if media_type is not None:
            if view is not None:
                raise ToolError("read: view_range is not supported for image/PDF files")
            return _media(file, shown, size, media_type)
        if extension == "ipynb" and view is None and size <= NOTEBOOK_BYTES_MAX:
            raw = file.read(NOTEBOOK_BYTES_MAX)
            try:
                rendered = render_notebook(raw).encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                rendered = raw  # not a notebook after all: show it as the text it is
            return _text(rendered, shown)
        if view is None and size > TEXT_BYTES_MAX:
            raise ToolError(f"read: {shown} is {size} bytes, more than {TEXT_BYTES_MAX}; use view_range")
        # Not trusting the size: files in /proc claim to be empty.
        return _text(_lines(file, shown, *view) if view is not None else file.read(TEXT_BYTES_MAX + 1), shown)


def _text(raw: bytes, shown: str) -> list[Block]:
    if len(raw) > TEXT_BYTES_MAX:
        raise ToolError(f"read: {shown} is more than {TEXT_BYTES_MAX} bytes; use view_range")
    if b"\0" in raw[:8192]:
        raise ToolError(f"read: {shown} is a binary file")
    return text_block(raw.decode(errors="replace"))


def write(arguments: dict[str, Any], config: Config) -> list[Block]:
    """Overwrite a whole file; parents are created."""
    shown = string("write", arguments, "file_path")
    data = string("write", arguments, "content").encode(errors="surrogateescape")
    path = config.resolve(shown)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as error:
        raise ToolError(f"write: {shown}: {reason(error)}") from error
    fd = open_regular("write", shown, path, os.O_WRONLY | os.O_CREAT)
    try:
        with os.fdopen(fd, "wb") as file:
            file.truncate(0)
            file.write(data)
    except OSError as error:
        raise ToolError(f"write: {shown}: {reason(error)}") from error
    return text_block(f"Wrote {len(data)} bytes to {shown}")


def edit(arguments: dict[str, Any], config: Config) -> list[Block]:
    """Replace a string that occurs exactly once, or every occurrence."""
    shown = string("edit", arguments, "file_path")
    old, new = string("edit", arguments, "old_string"), string("edit", arguments, "new_string")
    if not old:
        raise ToolError("edit: old_string is empty; use write to create a file")
    if old == new:
        raise ToolError("edit: old_string and new_string are the same")
    fd = open_regular("edit", shown, config.resolve(shown), os.O_RDWR)
    with os.fdopen(fd, "r+b") as file:
        raw = file.read(EDIT_BYTES_MAX + 1)
        if len(raw) > EDIT_BYTES_MAX:
            raise ToolError(f"edit: {shown} is more than {EDIT_BYTES_MAX} bytes")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise ToolError(f"edit: {shown} is not valid UTF-8 text") from error
        count = text.count(old)
        if count == 0:
            raise ToolError(f"edit: old_string not found in {shown}")
        if count > 1 and not arguments.get("replace_all"):
            raise ToolError(f"edit: old_string appears {count} times in {shown}; it must be unique or replace_all set")
        try:
            file.seek(0)
            file.truncate(0)
            file.write(text.replace(old, new).encode())
            file.flush()
        except OSError as error:
            raise ToolError(f"edit: {shown}: {reason(error)}") from error
    return text_block(f"Replaced {count} occurrence{'s' if count > 1 else ''} in {shown}")
