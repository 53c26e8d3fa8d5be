"""Lists: opaque cursors and keyset pages, newest first.

A cursor names the last row a client has seen, never an offset, so rows created meanwhile neither repeat nor
hide others. It is validated, not signed: all it can do is position a query that is scoped by the caller's
workspace anyway.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVarTuple, cast

import orjson
from pydantic import Field
from sqlalchemy import ColumnElement, Select, tuple_

from managed_agents.core import limits
from managed_agents.core.errors import InvalidRequest

Row = TypeVarTuple("Row")

PREFIX = "page_"
CURSOR_CHARS_MAX = 1000

PageLimit = Annotated[int, Field(ge=1, le=limits.PAGE_LIMIT_MAX)]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INT8_MAX = 2**63 - 1


def encode_cursor(listing: str, key: Sequence[str | int]) -> str:
    """Return an opaque cursor of the list called `listing`."""
    raw = orjson.dumps([listing, *key])
    return PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def decode_cursor(listing: str, cursor: str, shape: Sequence[type[str | int]]) -> list[Any]:
    """Return the key of a cursor that `encode_cursor` made for `listing`. Raises `InvalidRequest`."""
    invalid = InvalidRequest("invalid page cursor")
    body = cursor.removeprefix(PREFIX)
    if not cursor.startswith(PREFIX) or len(cursor) > CURSOR_CHARS_MAX or not body.isascii():
        raise invalid
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        values = orjson.loads(raw)
    except (binascii.Error, ValueError) as error:
        raise invalid from error
    parts = cast(list[Any], values) if isinstance(values, list) else []
    if not parts or parts[0] != listing:
        raise invalid
    key = parts[1:]
    if len(key) != len(shape) or any(type(part) is not kind for part, kind in zip(key, shape, strict=True)):
        raise invalid
    if any(isinstance(part, int) and abs(part) > _INT8_MAX for part in key):
        raise invalid
    if any(isinstance(part, str) and "\x00" in part for part in key):
        raise invalid
    return key


def as_micros(instant: datetime) -> int:
    """Return whole microseconds since 1970."""
    return (instant - _EPOCH) // timedelta(microseconds=1)


def from_micros(micros: int) -> datetime:
    """Undo `as_micros`. Raises `InvalidRequest`: the number comes out of a cursor."""
    try:
        return _EPOCH + timedelta(microseconds=micros)
    except OverflowError as error:
        raise InvalidRequest("invalid page cursor") from error


def newest_first(
    statement: Select[*Row],
    created_at: ColumnElement[datetime],
    id_: ColumnElement[str],
    *,
    listing: str,
    page: str | None,
    limit: int,
) -> Select[*Row]:
    """Order by age, start after the cursor, and fetch one row more than `limit`, which tells whether
    there is more.
    """
    if page is not None:
        micros, last_id = decode_cursor(listing, page, (int, str))
        statement = statement.where(tuple_(created_at, id_) < tuple_(from_micros(micros), last_id))
    return statement.order_by(created_at.desc(), id_.desc()).limit(limit + 1)


def next_page(listing: str, rows: Sequence[Any], limit: int) -> str | None:
    """Return the cursor behind the last row of a page fetched with `newest_first`, None at the end."""
    if len(rows) <= limit:
        return None
    last = rows[limit - 1]
    return encode_cursor(listing, [as_micros(last.created_at), last.id])


def page_body(data: Sequence[Mapping[str, Any]], cursor: str | None) -> dict[str, Any]:
    """Return the body of a page. `next_page` is absent on the last one (observed hosted behaviour)."""
    body: dict[str, Any] = {"data": list(data)}
    if cursor is not None:
        body["next_page"] = cursor
    return body


def created_between(
    column: ColumnElement[datetime], bounds: Mapping[Literal["gt", "gte", "lt", "lte"], datetime | None]
) -> list[ColumnElement[bool]]:
    """Compare `column` with `bounds` as clients see it, in whole milliseconds, in a form that an index can
    serve.

    Rows keep microseconds: without this, `lte` with an object's own `created_at` would exclude that object.
    """
    conditions: list[ColumnElement[bool]] = []
    for name, bound in bounds.items():
        if bound is None:
            continue
        floor = bound - timedelta(microseconds=bound.microsecond % 1000)
        ceiling = floor if floor == bound else _next_tick(floor)
        match name:
            case "gte":
                conditions.append(column >= ceiling)
            case "gt":
                conditions.append(column >= _next_tick(floor))
            case "lt":
                conditions.append(column < ceiling)
            case "lte":
                conditions.append(column < _next_tick(floor))
    return conditions


def _next_tick(instant: datetime) -> datetime:
    """Return the next millisecond; behind the last one that there is, the last instant."""
    try:
        return instant + timedelta(milliseconds=1)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)
