"""Base classes and value types of requests; no web framework in here, so services may use them."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")
_OFFSET = re.compile(r"([Zz]|[+-]\d\d:\d\d)$")


class RequestModel(BaseModel):
    """Base of all request bodies: no unknown fields, no coercion, no change after parsing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class QueryModel(BaseModel):
    """Base of all queries: no unknown parameters; values are text, so numbers and booleans are read from
    it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


def _instant(value: object) -> datetime:
    text = value if isinstance(value, str) else ""
    try:
        if _RFC3339.fullmatch(text) is None:
            raise ValueError
        whole, _, fraction = _OFFSET.sub("", text).partition(".")
        offset = text[-1] if text[-1] in "Zz" else text[-6:]
        instant = datetime.fromisoformat(whole.upper() + ("+00:00" if offset in "Zz" else offset))
        return instant.astimezone(UTC) + timedelta(microseconds=int(fraction[:6].ljust(6, "0")))
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
