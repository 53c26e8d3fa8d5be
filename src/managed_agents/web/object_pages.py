"""Lists of the administrative endpoints: `after_id` and `before_id` name an object, newest first.

Where an object stands is read when a page is asked for, so a name that is unknown, or outside what the caller may see,
is a 400 and not an empty page.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field
from sqlalchemy import ColumnElement, Select, tuple_

from managed_agents.core import limits
from managed_agents.core.errors import InvalidRequest
from managed_agents.db.engine import Tx
from managed_agents.web.models import QueryModel

Shown = TypeVar("Shown")


class ObjectPageQuery(QueryModel):
    """What these lists have in common (spec: `limit` defaults to 20, from 1 to 1000)."""

    limit: Annotated[int, Field(ge=1, le=limits.ADMIN_PAGE_LIMIT_MAX)] = limits.PAGE_LIMIT_DEFAULT
    after_id: str | None = None
    before_id: str | None = None


async def object_page(
    tx: Tx,
    statement: Select[*tuple[Any, ...]],
    visible: Select[*tuple[Any, ...]],
    query: ObjectPageQuery,
    *,
    created_at: ColumnElement[Any],
    id_: ColumnElement[Any],
    shown: Callable[[Sequence[Any]], Mapping[str, Any]],
) -> dict[str, Any]:
    """Return one page of `statement` as clients see it.

    `visible` selects everything the caller may name as a position, without the list's filters.
    """
    if query.after_id is not None and query.before_id is not None:
        raise InvalidRequest("before_id: cannot be combined with after_id")
    position = tuple_(created_at, id_)
    backwards = query.before_id is not None
    for name, value in (("after_id", query.after_id), ("before_id", query.before_id)):
        if value is None:
            continue
        row = (await tx.execute(visible.with_only_columns(created_at, id_).where(id_ == value))).one_or_none()
        if row is None:
            raise InvalidRequest(f"{name}: {value[:100]} not found")
        edge = tuple_(*row)
        statement = statement.where(position > edge if backwards else position < edge)
    order = (created_at.asc(), id_.asc()) if backwards else (created_at.desc(), id_.desc())
    rows = list((await tx.execute(statement.order_by(*order).limit(query.limit + 1))).all())
    has_more = len(rows) > query.limit
    data = [shown(row) for row in rows[: query.limit]]
    if backwards:
        data.reverse()
    return {
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
