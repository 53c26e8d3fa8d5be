"""The one way a tool fails."""

from __future__ import annotations


class ToolError(Exception):
    """Becomes an outcome with `is_error` and one text block. The model reads the message."""


def reason(error: OSError) -> str:
    """Return the operating system's own words."""
    return error.strerror or str(error)
