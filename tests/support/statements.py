"""What a piece of work sends to the database."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from managed_agents.db.direct import Statement
from managed_agents.db.engine import Database, Tx


@contextmanager
def noted(db: Database) -> Iterator[list[str]]:
    """The statements that go to `db` inside the block, through SQLAlchemy or past it."""
    seen: list[str] = []
    engine = db.engine.sync_engine

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    rows = Statement.rows

    async def noting(self: Statement, tx: Tx, values: Any) -> Any:
        connection = tx.sync_connection
        assert connection is not None
        if connection.engine.pool is engine.pool and connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            seen.append(self.sql)  # others are noted on their way through SQLAlchemy
        return await rows(self, tx, values)

    event.listen(engine, "before_cursor_execute", note)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Statement, "rows", noting)
            yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)
