"""Statements on the driver itself: the same rows, the same errors as through SQLAlchemy."""

from datetime import datetime
from decimal import Decimal

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from managed_agents.db.direct import Statement
from managed_agents.db.engine import Database, connection_lost

pytestmark = pytest.mark.anyio


async def test_rows_are_those_of_sqlalchemy(db: Database) -> None:
    sql = """SELECT CAST(:word AS text), CAST(:number AS int) + :number, '{"a": [1]}'::jsonb, '\\x00ff'::bytea, 1.50::numeric,
        NULL::text, CAST(:words AS text[]), timestamptz '2026-01-02 03:04:05.000006+00'"""
    values = {"word": "it's :word", "number": 20, "words": ["a", None]}
    async with db.autocommit() as tx:
        [row] = await Statement(sql).rows(tx, values)
        assert row == tuple((await tx.execute(text(sql), values)).one())
    assert row[:7] == ("it's :word", 40, {"a": [1]}, b"\x00\xff", Decimal("1.50"), None, ["a", None])
    assert isinstance(row[7], datetime)


async def test_a_refused_statement_is_no_lost_connection_and_says_no_values(db: Database) -> None:
    async with db.autocommit() as tx:
        with pytest.raises(DBAPIError) as refused:
            await Statement("SELECT 1 / CAST(:number AS int), CAST(:secret AS text)").rows(tx, {"number": 0, "secret": "hush"})
        assert not connection_lost(refused.value)
        assert "division by zero" in str(refused.value)
        assert refused.value.orig is not None
        assert refused.value.orig.sqlstate == "22012"  # type: ignore[attr-defined]
        await tx.execute(text("CREATE TABLE told (secret text, n int NOT NULL)"))
        with pytest.raises(DBAPIError) as refused:
            await Statement("INSERT INTO told VALUES (CAST(:secret AS text), NULL)").rows(tx, {"secret": "hush"})
        assert "not-null" in str(refused.value)
        assert "hush" not in str(refused.value)
        assert await Statement("SELECT 1").rows(tx, {}) == [(1,)]


async def test_a_connection_that_breaks_is_lost_and_replaced(db: Database) -> None:
    async with db.autocommit() as tx:
        with pytest.raises(DBAPIError) as broken:
            await Statement("SELECT pg_terminate_backend(pg_backend_pid())").rows(tx, {})
        assert connection_lost(broken.value)
    async with db.autocommit() as tx:
        assert await Statement("SELECT 1").rows(tx, {}) == [(1,)]


async def test_a_connection_whose_statement_was_cancelled_is_replaced(db: Database) -> None:
    pid, slow = Statement("SELECT pg_backend_pid()"), Statement("SELECT pg_sleep(60)")
    async with db.autocommit() as tx:
        [(before,)] = await pid.rows(tx, {})
        with anyio.move_on_after(0.1) as scope:
            await slow.rows(tx, {})
        assert scope.cancelled_caught
    async with db.autocommit() as tx:
        [(after,)] = await pid.rows(tx, {})
    assert after != before


async def test_it_joins_what_surrounds_it(db: Database) -> None:
    async with db.autocommit() as tx:
        await tx.execute(text("CREATE TABLE joined (n int)"))
    with pytest.raises(KeyError):
        async with db.unit_of_work():
            async with db.autocommit() as tx:
                await Statement("INSERT INTO joined VALUES (1) RETURNING n").rows(tx, {})
            raise KeyError
    async with db.autocommit() as tx:
        assert await Statement("SELECT count(*) FROM joined").rows(tx, {}) == [(0,)]
