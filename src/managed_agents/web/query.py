"""Query strings: closed models as for bodies, with the API's bracket names.

`types[]=a&types[]=b`, percent-encoded brackets and the plain repeat `types=a&types=b` mean the same.
`created_at[gte]` is one name. `beta` is ignored: old SDKs append it.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar, get_origin
from urllib.parse import parse_qsl

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from managed_agents.core.errors import InvalidRequest
from managed_agents.web.errors import PATH_PART_CHARS_MAX, from_validation

PARAMETERS_MAX = 2000
IGNORED = frozenset({"beta"})
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")


class QueryModel(BaseModel):
    """Base of all queries: no unknown parameters; values are text, so numbers and booleans are read from
    it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


def _instant(value: object) -> datetime:
    text = value if isinstance(value, str) else ""
    try:
        if _RFC3339.fullmatch(text) is None:
            raise ValueError
        whole, _, fraction = re.sub(r"([Zz]|[+-]\d\d:\d\d)$", "", text).partition(".")
        zone = text[len(whole) + (len(fraction) + 1 if fraction else 0) :]
        instant = datetime.fromisoformat(whole.upper() + ("+00:00" if zone in "Zz" else zone)).astimezone(UTC)
        return instant + timedelta(microseconds=int(fraction.ljust(6, "0")[:6] or 0))
    except (ValueError, OverflowError) as error:
        raise PydanticCustomError("rfc3339", "Input should be an RFC 3339 timestamp with an offset") from error


def _flag(value: object) -> bool:
    if value in ("true", "True", "1"):
        return True
    if value in ("false", "False", "0"):
        return False
    raise PydanticCustomError("flag", "Input should be `true` or `false`")


Instant = Annotated[datetime, BeforeValidator(_instant)]
Flag = Annotated[bool, BeforeValidator(_flag)]

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
