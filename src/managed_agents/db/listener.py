"""Doorbells: coalesced notifications after the commit, and the connection that hears them.

A notification carries ids only and is never trusted: receivers read the tables. Everything stays correct without them,
because every receiver also polls. `NOTIFY` inside an append transaction would serialise all commits, so it never is there.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast
from uuid import uuid4

import anyio
import orjson

from managed_agents.core import limits
from managed_agents.core.logs import Trouble
from managed_agents.db.connection import TROUBLE, connect

logger = logging.getLogger(__name__)

PAYLOAD_BYTES_MAX = 7500  # Postgres refuses payloads of 8,000 bytes
COALESCE_SECONDS = 0.002
RECONNECT_SECONDS = 0.5
FROM = "from:"  # before the name of who rings; no id begins like that
PENDING_IDS_MAX = 100_000  # beyond it rings are dropped; the polls cover them

LOG_CHANNEL = "managed_agents_log"
"""Rings with session ids that have new rows (streams listen)."""
WORK_CHANNEL = "managed_agents_work"
"""Rings with session ids that have new input (workers listen)."""

KEYS_CHANNEL = "managed_agents_keys"
"""Rings with ids of keys and workspaces whose rights changed (api processes listen). Rung inside the transaction."""

Listener = Callable[[list[Any]], None]


class Doorbell:
    """Sends rings of this process, at most one statement per channel and few milliseconds, on a connection of its own."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        # In this order: a turn waits for work, a stream for its log.
        self._pending: dict[str, dict[str, None]] = {WORK_CHANNEL: {}, LOG_CHANNEL: {}}
        self._wake = anyio.Event()
        self.name = f"{FROM}{uuid4().hex}"
        """Stands before the ids of each ring of the log, so that its own process does not listen to it."""

    def ring(self, channel: str, session_id: str) -> None:
        """Ring for `session_id`. Best effort; never waits."""
        pending = self._pending[channel]
        if len(pending) < PENDING_IDS_MAX:
            pending[session_id] = None
            self._wake.set()

    async def run(self) -> None:
        """Send until cancelled, reconnecting for ever."""
        trouble = Trouble(logger)
        while True:
            try:
                connection = await connect(self._database_url)
                trouble.over("doorbell connection is back")
                try:
                    await self._send_forever(connection)
                finally:
                    connection.terminate()
            except TROUBLE as error:
                trouble.report("doorbell connection lost: %s", str(error) or type(error).__name__)
            await anyio.sleep(RECONNECT_SECONDS)

    async def _send_forever(self, connection: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            for channel, pending in self._pending.items():
                while pending:
                    names = [self.name] if channel == LOG_CHANNEL else []
                    payload = orjson.dumps([*names, *_take(pending)]).decode()
                    await connection.execute(
                        "SELECT pg_notify($1, $2)",
                        channel,
                        payload,
                        timeout=limits.DATABASE_STATEMENT_SECONDS,
                    )
            await anyio.sleep(COALESCE_SECONDS)


def _take(pending: dict[str, None]) -> list[str]:
    taken: list[str] = []
    size = 2
    for session_id in pending:
        size += len(session_id) + 3
        if size > PAYLOAD_BYTES_MAX:
            break
        taken.append(session_id)
    for session_id in taken:
        del pending[session_id]
    return taken


async def listen(
    database_url: str,
    listeners: Mapping[str, Listener],
    on_connect: Callable[[], Awaitable[None]] | None = None,
    *,
    beside: Doorbell | None = None,
) -> None:
    """Hear the channels of `listeners` until cancelled, reconnecting for ever.

    Rings of the log by `beside` are not heard: who rings it has told this process already. `on_connect` runs after each
    (re)connection: what was rung meanwhile was not heard, so the receiver reads everything.
    """
    trouble = Trouble(logger)
    heard = ", ".join(listeners)
    while True:
        try:
            connection = await connect(database_url)
            try:
                closed = anyio.Event()
                connection.add_termination_listener(_setter(closed))
                for channel, listener in listeners.items():
                    await connection.add_listener(channel, _callback(listener, beside))
                if on_connect is not None:
                    await on_connect()
                trouble.over(f"listening connection ({heard}) is back")
                await closed.wait()
            finally:
                connection.terminate()
            trouble.report("listening connection (%s) closed by the server", heard)
        except TROUBLE as error:
            trouble.report("listening connection (%s) lost: %s", heard, str(error) or type(error).__name__)
        await anyio.sleep(RECONNECT_SECONDS)


def _callback(listener: Listener, beside: Doorbell | None) -> Callable[..., None]:
    def heard(_connection: object, _pid: int, _channel: str, payload: str) -> None:
        try:
            items = orjson.loads(payload)
        except orjson.JSONDecodeError:
            items = None
        if not isinstance(items, list):
            logger.warning("unreadable notification ignored")
            return
        ids = cast("list[Any]", items)
        rung_by = ids.pop(0) if ids and str(ids[0]).startswith(FROM) else None
        if beside is None or rung_by != beside.name:
            listener(ids)

    return heard


def _setter(event: anyio.Event) -> Callable[[object], None]:
    return lambda _connection: event.set()
