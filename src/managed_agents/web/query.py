"""Query strings: closed models as for bodies, with the API's bracket names.

`types[]=a&types[]=b`, percent-encoded brackets and the plain repeat `types=a&types=b` mean the same.
`created_at[gte]` is one name. `beta` is ignored: old SDKs append it.
"""

from typing import Any, TypeVar, get_origin
from urllib.parse import parse_qsl

from pydantic import ValidationError
from starlette.requests import Request

from managed_agents.core.errors import InvalidRequest
from managed_agents.web.errors import PATH_PART_CHARS_MAX, from_validation
from managed_agents.web.models import QueryModel

PARAMETERS_MAX = 2000
IGNORED = frozenset({"beta"})


Q = TypeVar("Q", bound=QueryModel)


def parse(request: Request, model: type[Q]) -> Q:
    """Validate the query string of `request` as `model`. Raises `InvalidRequest` naming the parameter."""
    values = _collect(request.scope["query_string"], _lists(model))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise from_validation(error, values, root="query") from error


def _lists(model: type[QueryModel]) -> frozenset[str]:
    """Return the names of array parameters, without brackets."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        if any(get_origin(kind) is list for kind in kinds):
            names.add(field.alias or name)
    return frozenset(names)


def _collect(raw: bytes, lists: frozenset[str]) -> dict[str, Any]:
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=PARAMETERS_MAX)
    except ValueError as error:
        raise InvalidRequest("query: malformed query string") from error
    values: dict[str, Any] = {}
    for key, value in pairs:
        name = key.removesuffix("[]") if key.removesuffix("[]") in lists else key
        if name in IGNORED:
            continue
        shown = name[:PATH_PART_CHARS_MAX].replace("\x00", "\\u0000")
        if "\x00" in key or "\x00" in value:
            raise InvalidRequest(f"{shown}: text must not contain NUL characters (U+0000)")
        if name in lists:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise InvalidRequest(f"{shown}: given more than once")
        else:
            values[name] = value
    return values
