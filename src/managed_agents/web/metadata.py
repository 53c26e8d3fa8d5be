"""Metadata of any object: limits, and the merge patch of updates."""

from collections.abc import Mapping

from managed_agents.core import limits
from managed_agents.core.errors import InvalidRequest


def checked(metadata: Mapping[str, str], *, error_code: str | None = None) -> dict[str, str]:
    """Return a copy within the limits. Raises `InvalidRequest` naming the pair."""
    if len(metadata) > limits.METADATA_PAIRS_MAX:
        raise InvalidRequest(f"metadata: at most {limits.METADATA_PAIRS_MAX} pairs are allowed", error_code=error_code)
    for key, value in metadata.items():
        shown = key[: limits.METADATA_KEY_CHARS_MAX]
        if not 1 <= len(key) <= limits.METADATA_KEY_CHARS_MAX:
            reason = f"keys must have 1 to {limits.METADATA_KEY_CHARS_MAX} characters"
            raise InvalidRequest(f"metadata.{shown}: {reason}", error_code=error_code)
        if len(value) > limits.METADATA_VALUE_CHARS_MAX:
            reason = f"values must have at most {limits.METADATA_VALUE_CHARS_MAX} characters"
            raise InvalidRequest(f"metadata.{shown}: {reason}", error_code=error_code)
    return dict(metadata)


def merged(
    stored: Mapping[str, str],
    patch: Mapping[str, str | None],
    *,
    empty_deletes: bool = False,
    error_code: str | None = None,
) -> dict[str, str]:
    """Apply `patch`: a string sets a key, null deletes it, keys not named stay. Limits hold for the
    result.
    """
    result = dict(stored)
    for key, value in patch.items():
        if value is None or (empty_deletes and value == ""):
            result.pop(key, None)
        else:
            result[key] = value
    return checked(result, error_code=error_code)
