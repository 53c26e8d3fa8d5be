"""What of sessions this server does not serve yet; the only place for such refusals. A later feature lifts its own line.

Each function is a validator that runs before a value's own shape is looked at, so that the message names the thing itself
and not some detail of it.
"""

from typing import Any, cast

from pydantic_core import PydanticCustomError

EVENTS = frozenset({"user.define_outcome"})
RESOURCES = frozenset({"memory_store"})
SOURCES = frozenset({"file"})


def _refusal(what: str) -> PydanticCustomError:
    return PydanticCustomError("not_served", "{what} is not served yet by this server", {"what": what})


def _kind(value: Any) -> str | None:
    kind = cast(dict[str, object], value).get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


def event(value: Any) -> Any:
    """Refuse events whose effect is not built."""
    if (kind := _kind(value)) in EVENTS:
        raise _refusal(f'"{kind}"')
    return cast(object, value)


def resource(value: Any) -> Any:
    """Refuse resources that cannot be mounted."""
    if (kind := _kind(value)) in RESOURCES:
        raise _refusal(f'"{kind}"')
    return cast(object, value)


def added_resource(value: Any) -> Any:
    """Refuse what a living session cannot be given. spec: resource_add_params.py, files only"""
    if _kind(value) == "github_repository":
        raise PydanticCustomError("create_only", 'a "github_repository" resource can only be given when a session is created')
    return resource(value)


def source(value: Any) -> Any:
    """Refuse content sources that cannot be resolved."""
    if (kind := _kind(value)) in SOURCES:
        raise _refusal(f'source type "{kind}"')
    return cast(object, value)


def nothing(value: Any) -> Any:
    """Refuse any value but null and the empty list."""
    if value not in (None, []):
        raise _refusal("this field")
    return cast(object, value)
