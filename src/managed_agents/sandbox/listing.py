"""Reading a listing of files. Whoever made it runs as the commands' uid, so commands may have written what they liked: nothing
of it is believed but that such files may be asked for. Pure.
"""

import math
import re
from typing import Any, cast

import orjson

from managed_agents.sandbox.backend import FileEntry, SandboxError

FILES_MAX = 10_000
PATH_BYTES_MAX = 64 * 1024
SIZE_MAX = 2**62
SIGNATURE_CHARS_MAX = 200
_SHA256 = re.compile(r"[0-9a-f]{64}|")


def read(body: bytes) -> list[FileEntry]:
    """The files of a listing. Raises: SandboxError for what is none."""
    try:
        found = orjson.loads(body)
        if not isinstance(found, list) or len(cast(list[Any], found)) > FILES_MAX:
            raise ValueError("no list of files")
        return [_entry(each) for each in cast(list[Any], found)]
    except (ValueError, OverflowError) as error:
        raise SandboxError("the runner's listing cannot be read") from error


def _entry(found: Any) -> FileEntry:
    if not isinstance(found, dict):
        raise ValueError("a file is no object")
    given = cast(dict[str, Any], found)
    path, sha256, signature = given.get("path"), given.get("sha256"), given.get("signature", "")
    if not isinstance(path, str) or not _is_below(path):
        raise ValueError("a path is none below a directory")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError("a digest is none")
    if not isinstance(signature, str) or len(signature) > SIGNATURE_CHARS_MAX:
        raise ValueError("a signature is none")
    size = _number(given.get("size"))
    if not isinstance(size, int) or not 0 <= size <= SIZE_MAX:
        raise ValueError("a size is none")
    mtime, unchanged = _number(given.get("mtime")), _number(given.get("unchanged_seconds", 0.0))
    return FileEntry(path, size, float(mtime), sha256, signature, max(0.0, float(unchanged)))


def _is_below(path: str) -> bool:
    whole = all(part not in ("", ".", "..") for part in path.split("/"))
    return whole and "\0" not in path and len(path.encode()) <= PATH_BYTES_MAX


def _number(found: Any) -> int | float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError("a number is none")
    return found
