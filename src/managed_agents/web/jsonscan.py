"""What the JSON parser does not tell: how many values a text holds before they are made, and whether keys repeat.

A value of two bytes becomes an object of sixty, so a body within its size could still cost gigabytes: counted here first. Pure,
linear, and bounded: it stops at the limit.
"""

import json
import re
from typing import Any

# One string, and the colon behind it when it is a key. Possessive, and an unclosed string runs to the end: no backtracking.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)[ \t\r\n]*+(:?)', re.DOTALL)


class TooManyValues(ValueError):
    """The text holds more values than allowed."""


def count_keys(raw: bytes, *, values_max: int) -> int:
    """Return how many keys the objects of the JSON text `raw` are written with. Raises `TooManyValues`."""
    if len(raw) <= values_max:  # every value takes a byte at least
        return _STRING.findall(raw).count(b":")
    keys = values = end = 0
    for strings, found in enumerate(_STRING.finditer(raw)):
        keys += found.end(1) > found.start(1)
        values += _separators(raw, end, found.start())
        end = found.end()
        if values > values_max or strings > 2 * values_max:
            raise TooManyValues
    if values + _separators(raw, end, len(raw)) > values_max:
        raise TooManyValues
    return keys


def repeated_key(text: str) -> str:
    """Return a key that an object of the valid JSON text has twice; empty when none has."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen and not found:
                found.append(key)
            seen.add(key)

    json.loads(text, object_pairs_hook=look)
    return found[0] if found else ""


def _separators(raw: bytes, start: int, end: int) -> int:
    return raw.count(b",", start, end) + raw.count(b"[", start, end) + raw.count(b"{", start, end)
