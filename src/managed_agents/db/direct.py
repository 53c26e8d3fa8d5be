"""Hot statements, run on the driver itself: SQLAlchemy's way to it costs more processor time than the driver does.

For the few that every turn passes, on connections where each statement is its own transaction (`Database.autocommit`). Inside a
transaction they go SQLAlchemy's way, which begins one with its first statement.
"""

import re
from collections.abc import Mapping
from typing import Any

import anyio
from asyncpg import InterfaceError, InternalClientError, PostgresError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from managed_agents.db.engine import Tx

_NAME = re.compile(r"(?<!:):([a-z]\w*)")  # not a cast's


class DriverError(Exception):
    """What the driver said, as the `orig` of SQLAlchemy's error: without its detail, which shows values of rows."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error.args[0] if error.args else ''}")
        self.sqlstate: str | None = getattr(error, "sqlstate", None)
        self.__cause__ = error


class Statement:
    """SQL with parameters as `:name`, like SQLAlchemy's `text`. The driver keeps it prepared."""

    def __init__(self, sql: str) -> None:
        self._clause = text(sql)
        self._names = list(dict.fromkeys(_NAME.findall(sql)))
        places = {name: f"${number}" for number, name in enumerate(self._names, 1)}
        self.sql = _NAME.sub(lambda found: places[found[1]], sql)

    async def rows(self, tx: Tx, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run it and return its rows, with values as the driver has them.

        Raises:
            DBAPIError: what the driver raised, with its `sqlstate`; inside a transaction it is SQLAlchemy's own subclass.
        """
        connection = tx.sync_connection
        assert connection is not None
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            return [tuple(row) for row in await tx.execute(self._clause, {name: values[name] for name in self._names})]
        driver: Any = connection.connection.driver_connection
        try:
            found = await driver.fetch(self.sql, *[values[name] for name in self._names])
        except (PostgresError, InterfaceError, InternalClientError) as error:
            original = DriverError(error)
            closed: bool = driver.is_closed()
            raise DBAPIError(self.sql, None, original, hide_parameters=True, connection_invalidated=closed) from original
        except (anyio.get_cancelled_exc_class(), TimeoutError, OSError):
            # As SQLAlchemy does: whoever got it next would wait for the server to hear of the end of this one.
            connection.invalidate()
            raise
        return [tuple(row) for row in found]
