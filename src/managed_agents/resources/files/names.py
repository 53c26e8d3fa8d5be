"""File names and media types, from whatever a client sent. Pure."""

import mimetypes
import re

from managed_agents.core.errors import InvalidRequest

NAME_CHARS_MAX = 255
MIME_CHARS_MAX = 255
MIME_DEFAULT = "application/octet-stream"
_FORBIDDEN = re.compile(r'[<>:"|?*\\/\x00-\x1f]')
_MIME = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+")


def filename_of(sent: str | None, mime_type: str) -> str:
    """Return the last path component of `sent`, or a made-up name. Raises `InvalidRequest` naming `file`."""
    name = re.split(r"[/\\]", sent or "")[-1]
    if not name:
        return "unnamed" + (mimetypes.guess_extension(mime_type) or "")
    if len(name) > NAME_CHARS_MAX:
        raise InvalidRequest(f"file: filename must have 1 to {NAME_CHARS_MAX} characters")
    if _FORBIDDEN.search(name) or name in (".", ".."):
        raise InvalidRequest('file: filename must not contain < > : " | ? * \\ / or control characters')
    return name


def output_filename(path: str) -> str:
    """Return the name under which an output is shown; what names may not contain becomes `_`."""
    name = _FORBIDDEN.sub("_", path.rsplit("/", 1)[-1])[:NAME_CHARS_MAX]
    return name or "unnamed"


def mime_type_of(sent: str | None, filename: str | None) -> str:
    """Return the media type as sent, else guessed from the name."""
    essence = (sent or "").partition(";")[0].strip().lower()
    if len(essence) <= MIME_CHARS_MAX and _MIME.fullmatch(essence):
        return essence
    return mimetypes.guess_type(filename or "", strict=False)[0] or MIME_DEFAULT
