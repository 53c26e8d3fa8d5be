"""Small checks that compose into the shape of a request.

A check takes a value and the path to it and raises `Refused` when the real API would refuse; it changes
nothing. Unknown fields are refused everywhere, so a request that passes here carries nothing that the real
API does not know.
"""

import re
from collections.abc import Callable, Mapping
from typing import cast

Check = Callable[[object, str], None]
JsonObject = dict[str, object]


class Refused(Exception):
    """The request is not acceptable: HTTP `status`, envelope `error_type` and `message`."""

    def __init__(self, message: str, *, status: int = 400, error_type: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.error_type = error_type


def refuse(path: str, message: str) -> Refused:
    """Return the refusal of the field at `path`."""
    return Refused(f"{path}: {message}" if path else message)


def at(path: str, key: str | int) -> str:
    """Return the path of `key` below `path`."""
    return f"{path}.{key}" if path else str(key)


def anything(_value: object, _path: str) -> None:
    """Accept any value."""


def boolean(value: object, path: str) -> None:
    if not isinstance(value, bool):
        raise refuse(path, "Input should be a valid boolean")


def a_dict(value: object, path: str) -> None:
    if not isinstance(value, dict):
        raise refuse(path, "Input should be a valid dictionary")


def string(*, min_chars: int = 0, max_chars: int | None = None, pattern: str | None = None) -> Check:
    """Check for a string, optionally of a length and a whole-string pattern."""
    regex = re.compile(pattern) if pattern is not None else None

    def check(value: object, path: str) -> None:
        if not isinstance(value, str):
            raise refuse(path, "Input should be a valid string")
        if len(value) < min_chars:
            raise refuse(path, f"String should have at least {min_chars} character{'s' * (min_chars > 1)}")
        if max_chars is not None and len(value) > max_chars:
            raise refuse(path, f"String should have at most {max_chars} characters")
        if regex is not None and regex.fullmatch(value) is None:
            raise refuse(path, f"String should match pattern '^{pattern}$'")

    return check


def integer(*, least: int) -> Check:
    def check(value: object, path: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise refuse(path, "Input should be a valid integer")
        if value < least:
            raise refuse(path, f"Input should be greater than or equal to {least}")

    return check


def number(*, least: float, most: float) -> Check:
    def check(value: object, path: str) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise refuse(path, "Input should be a valid number")
        if not least <= value <= most:
            raise refuse(path, f"Input should be between {least:g} and {most:g}")

    return check


def one_of(*choices: str) -> Check:
    expected = " or ".join(f"'{choice}'" for choice in choices)

    def check(value: object, path: str) -> None:
        if not isinstance(value, str) or value not in choices:
            raise refuse(path, f"Input should be {expected}")

    return check


def nullable(inner: Check) -> Check:
    def check(value: object, path: str) -> None:
        if value is not None:
            inner(value, path)

    return check


def list_of(inner: Check, *, least: int = 0, most: int | None = None) -> Check:
    def check(value: object, path: str) -> None:
        if not isinstance(value, list):
            raise refuse(path, "Input should be a valid list")
        items = cast("list[object]", value)
        if len(items) < least:
            raise refuse(path, f"List should have at least {least} item{'s' * (least > 1)}")
        if most is not None and len(items) > most:
            raise refuse(path, f"List should have at most {most} items")
        for index, item in enumerate(items):
            inner(item, f"{path}.{index}")

    return check


def text_or(inner: Check) -> Check:
    """Check for a string, or else `inner`."""

    def check(value: object, path: str) -> None:
        if not isinstance(value, str):
            inner(value, path)

    return check


def shape(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Check for an object with exactly these fields."""
    optional = optional or {}
    fields = {**required, **optional}

    def check(value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise refuse(path, "Input should be an object")
        given = cast("JsonObject", value)
        for name in required:
            if name not in given:
                raise refuse(at(path, name), "Field required")
        for name, field in given.items():
            inner = fields.get(name)
            if inner is None:
                raise refuse(at(path, name), "Extra inputs are not permitted")
            inner(field, at(path, name))

    return check


def tagged(shapes: Mapping[str, Check]) -> Check:
    """Check for an object whose `type` selects the shape."""

    def check(value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise refuse(path, "Input should be an object")
        given = cast("JsonObject", value)
        tag = given.get("type")
        if tag is None:
            raise refuse(at(path, "type"), "Field required")
        inner = shapes.get(tag) if isinstance(tag, str) else None
        if inner is None:
            expected = ", ".join(f"'{name}'" for name in shapes)
            raise refuse(
                path,
                f"Input tag '{tag}' found using 'type' does not match any of the expected tags: {expected}",
            )
        inner(given, path)

    return check
