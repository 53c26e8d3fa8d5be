"""One engine per process, and the one way to open a transaction.

Statements are SQLAlchemy Core on an `AsyncConnection`; rows become frozen models before the transaction ends. Functions
that receive a `tx` never commit. No network call of ours happens inside a transaction.
"""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, NewType, cast

import asyncpg
import orjson
from anyio import get_current_task
from asyncpg import InterfaceError, InternalClientError, PostgresError
from sqlalchemy import MetaData, event
from sqlalchemy.engine import URL, AdaptedConnection, make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from managed_agents.core import limits

# A frozen process must not keep its locks, neither between two statements nor in the middle of one: asyncpg prepares and
# executes in two messages, and to the server the gap is a running statement. Servers before this version bound only the former.
TRANSACTION_TIMEOUT_SINCE = 17

# The classes of SQLSTATE for connections, for a server that stops, crashes or starts, and for one to which all come at once.
_WENT_AWAY = ("08", "57P01", "57P02", "57P03", "53300")

_ARRAYS_OF = ("text", "bigint", "int", "float8", "numeric", "bool", "bytea", "timestamptz")

Tx = NewType("Tx", AsyncConnection)
"""A connection inside an open transaction."""


class Base(DeclarativeBase):
    """Declarative base of all tables. Constraints carry names; errors are matched by them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def sqlalchemy_url(database_url: str) -> URL:
    """Turn a libpq style URL (`postgresql://…?host=/socket/dir`) into one for SQLAlchemy's asyncpg dialect."""
    return make_url(database_url).set(drivername="postgresql+asyncpg")


def asyncpg_arguments(database_url: str) -> dict[str, Any]:
    """Keyword arguments for `asyncpg.connect` that mean the same as `database_url`."""
    url = make_url(database_url)
    host = url.query.get("host", url.host)
    return {
        "host": host if isinstance(host, str) else None,
        "port": url.port or 5432,
        "user": url.username,
        "password": url.password or None,
        "database": url.database,
        "timeout": limits.DATABASE_CONNECT_SECONDS,
    }


def _dumps(value: Any) -> str:
    return orjson.dumps(value).decode()


async def _connect(**arguments: Any) -> Any:
    """Raises: ConnectionError, whatever way it is that the server cannot be reached; what the server says itself."""
    try:
        return await cast(Any, asyncpg).connect(**arguments)
    except ConnectionError:
        raise
    except (OSError, TimeoutError) as error:
        # A server that was stopped took its socket's file with it; a name may not resolve; a host may be silent.
        raise ConnectionError(f"the database cannot be reached: {str(error) or type(error).__name__}") from error


async def _prepare(connection: Any) -> None:  # asyncpg's, which has no types for it
    # asyncpg looks array types up when it first meets them, which takes it tens of milliseconds: now, not while a transaction
    # holds a session's lock.
    await connection.prepare("SELECT " + ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(_ARRAYS_OF, 1)))
    if connection.get_server_version().major >= TRANSACTION_TIMEOUT_SINCE:
        await connection.execute(f"SET transaction_timeout = {int(limits.FROZEN_SECONDS * 1000)}")


def _prepare_connection(dbapi_connection: AdaptedConnection, _record: object) -> None:
    dbapi_connection.run_async(_prepare)


def _look_at_connection(dbapi_connection: AdaptedConnection, _record: object, _proxy: object) -> None:
    """Have the pool replace a connection whose end was heard while nobody used it, as after a restart of the server."""
    if dbapi_connection.driver_connection.is_closed():
        raise DisconnectionError


def connection_lost(error: BaseException) -> bool:
    """Whether `error` says that the database, or the connection to it, went away: another try may do.

    What was under way may have been committed. A statement that the server refused is none of it.
    """
    if not isinstance(error, DBAPIError):
        return isinstance(error, ConnectionError)
    if error.connection_invalidated:
        return True
    cause = error.orig.__cause__ if error.orig is not None else None
    if isinstance(cause, PostgresError):
        return str(cast(Any, cause).sqlstate).startswith(_WENT_AWAY)
    return isinstance(cause, (InterfaceError, InternalClientError))


class UnitOfWork:
    """A transaction that every transaction of one task joins until it ends."""

    def __init__(self, database: "Database", tx: Tx) -> None:
        self.database = database
        self.after_commit: list[Callable[[], None]] = []
        self._tx = tx
        self._task = get_current_task().id

    @asynccontextmanager
    async def joined(self) -> AsyncGenerator[Tx]:
        """Run the block inside a savepoint: its failure undoes it alone, and only the unit commits."""
        assert get_current_task().id == self._task, "a unit of work belongs to one task"
        async with self._tx.begin_nested():
            yield self._tx


# Ambient on purpose (adr/0014): whatever a request does must join, also code that never heard of it.
_unit: ContextVar[UnitOfWork | None] = ContextVar("unit_of_work", default=None)


def after_commit(call: Callable[[], None]) -> None:
    """Call at once what follows a commit, or after the commit of the unit of work that surrounds us."""
    unit = _unit.get()
    if unit is None:
        call()
    else:
        unit.after_commit.append(call)


@contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except (InterfaceError, InternalClientError, PostgresError) as error:
        raise ConnectionError(f"the database connection broke: {error}") from error


class Database:
    """The engine of one process."""

    def __init__(self, database_url: str, *, pool: int, application_name: str) -> None:
        self.url = database_url
        self.engine: AsyncEngine = create_async_engine(
            sqlalchemy_url(database_url),
            pool_size=pool,
            max_overflow=0,
            # The warmest one, whose server process has its statements planned.
            pool_use_lifo=True,
            pool_timeout=limits.LOCK_TIMEOUT_SECONDS,
            pool_pre_ping=False,
            hide_parameters=True,  # an error is logged; what the user wrote, or a secret, is not
            json_serializer=_dumps,
            json_deserializer=orjson.loads,
            connect_args={
                "async_creator_fn": _connect,
                "timeout": limits.DATABASE_CONNECT_SECONDS,
                "command_timeout": limits.DATABASE_STATEMENT_SECONDS,
                # What runs on the driver itself is prepared once for each connection (`direct.py`).
                "max_cached_statement_lifetime": 0,
                "max_cacheable_statement_size": 0,
                "server_settings": {
                    "application_name": application_name,
                    "jit": "off",
                    # The pool's coldest connections may rest for hours: so that nothing between here and there forgets them.
                    "tcp_keepalives_idle": "60",
                    "lock_timeout": f"{int(limits.LOCK_TIMEOUT_SECONDS * 1000)}ms",
                    "idle_in_transaction_session_timeout": f"{int(limits.FROZEN_SECONDS * 1000)}ms",
                },
            },
        )
        event.listen(self.engine.sync_engine, "connect", _prepare_connection)
        event.listen(self.engine.sync_engine, "checkout", _look_at_connection)
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Tx]:
        """Open a transaction; commit at the end of the block, roll back when it raises.

        Raises:
            ConnectionError: the server cannot be reached, was just closing the connection, or did so while it was made;
                SQLAlchemy translates every other failure.
        """
        if (unit := self._unit()) is not None:
            async with unit.joined() as tx:
                yield tx
            return
        with _translated():
            async with self.engine.begin() as connection:
                yield Tx(connection)

    @asynccontextmanager
    async def autocommit(self) -> AsyncGenerator[Tx]:
        """A connection on which each statement is its own transaction: for reads, and for a write that is one statement.

        It saves two of three round trips. A read sees what was committed when it began, as it would inside a transaction
        (READ COMMITTED). Raises as `transaction` does.
        """
        if (unit := self._unit()) is not None:
            async with unit.joined() as tx:
                yield tx
            return
        with _translated():
            async with self._autocommit.connect() as connection:
                yield Tx(connection)

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncGenerator[Tx]:
        """Open a transaction that everything this task does on this database joins until the block ends.

        What is given to `after_commit` meanwhile happens after its commit, and not at all when it fails.
        """
        assert _unit.get() is None, "units of work do not nest"
        async with self.transaction() as tx:
            unit = UnitOfWork(self, tx)
            token = _unit.set(unit)
            try:
                yield tx
            finally:
                _unit.reset(token)
        for call in unit.after_commit:
            call()

    def _unit(self) -> UnitOfWork | None:
        unit = _unit.get()
        return unit if unit is not None and unit.database is self else None

    async def dispose(self) -> None:
        """Close the pool."""
        await self.engine.dispose()
