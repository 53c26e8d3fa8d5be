"""A worker's sign of life: one row, one connection, one advisory lock.

The connection is outside the pool on purpose. When it is lost for longer than the TTL, other workers have taken the sessions;
this worker then ends all its turns and registers anew under another id.
"""

import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import orjson

from managed_agents.core import faults, ids, limits
from managed_agents.core.logs import Trouble
from managed_agents.db.connection import TROUBLE, connect
from managed_agents.db.listener import WORK_CHANNEL
from managed_agents.harness.lease import LOCK_CLASS

logger = logging.getLogger(__name__)

REGISTERED = faults.register("worker.registered", "lock and row in place, nothing claimed")
RECONNECT_SECONDS = 0.5
HOST_TTLS = 2  # a host whose workers all died has that long for another one, before its sessions go elsewhere
_HOST_LIVES = (
    "INSERT INTO hosts (name, alive_until) VALUES ($1, clock_timestamp() + make_interval(secs => $2)) "
    "ON CONFLICT (name) DO UPDATE SET alive_until = excluded.alive_until"
)


async def live(database_url: str, *, host: str, ttl_seconds: float, work: Callable[[str], Awaitable[None]]) -> None:
    """Register, run `work(worker_id)` while heartbeating, and start over when the sign of life is lost.

    Returns when `work` returns. Cancelling it unregisters the worker, so that its sessions are free at once.
    """
    trouble = Trouble(logger)
    former: str | None = None
    while True:
        worker_id = ids.new_id(ids.WORKER)
        try:
            connection = await _registered(database_url, worker_id, former, host=host, ttl_seconds=ttl_seconds)
        except TROUBLE as error:
            trouble.report("no database for the heartbeat: %s", str(error) or type(error).__name__)
            await anyio.sleep(RECONNECT_SECONDS)
            continue
        trouble.over("the database is back for the heartbeat")
        former = worker_id
        try:
            faults.reach(REGISTERED)
            if await _live_once(connection, worker_id, host=host, ttl_seconds=ttl_seconds, work=work):
                return
        finally:
            connection.terminate()


async def _registered(database_url: str, worker_id: str, former: str | None, *, host: str, ttl_seconds: float) -> Any:
    """The connection that keeps the worker's lock. One that is lost on the way leaves nothing that counts as alive."""
    connection = await connect(database_url)
    try:
        with anyio.fail_after(limits.DATABASE_STATEMENT_SECONDS):
            if former is not None:
                # We are alive: what we had did not kill us, and must not count as if it had.
                await _unregister(connection, former)
            await _register(connection, worker_id, host=host, ttl_seconds=ttl_seconds)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _register(connection: Any, worker_id: str, *, host: str, ttl_seconds: float) -> None:
    # The lock first, then the row: a row without its lock is a dead worker.
    lock_key: int = await connection.fetchval("SELECT nextval(pg_get_serial_sequence('workers', 'lock_key'))")
    await connection.execute("SELECT pg_advisory_lock($1, $2)", LOCK_CLASS, lock_key)
    await connection.execute(
        "INSERT INTO workers (id, lock_key, host, pid) OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3, $4)",
        worker_id,
        lock_key,
        host,
        os.getpid(),
    )
    await connection.execute(_HOST_LIVES, host, HOST_TTLS * ttl_seconds)


async def _live_once(
    connection: Any, worker_id: str, *, host: str, ttl_seconds: float, work: Callable[[str], Awaitable[None]]
) -> bool:
    finished = False

    async def worked() -> None:
        nonlocal finished
        await work(worker_id)
        finished = True
        group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(worked)
            try:
                await _beat_forever(connection, worker_id, host, ttl_seconds)
            except TROUBLE as error:
                logger.error("sign of life lost, giving up all sessions: %s", str(error) or type(error).__name__)
                group.cancel_scope.cancel()
    finally:
        with anyio.move_on_after(limits.DATABASE_CONNECT_SECONDS, shield=True):
            await _unregister(connection, worker_id)
    return finished


async def _unregister(connection: Any, worker_id: str) -> None:
    """Free our sessions at once; when that fails the others will, once they see the lock gone."""
    try:
        freed = await connection.fetch(
            "UPDATE sessions SET owner = NULL, epoch = epoch + 1 WHERE owner = $1 RETURNING id", worker_id
        )
        await connection.execute("DELETE FROM workers WHERE id = $1", worker_id)
        if freed:
            # Whoever has room looks for all there is: one id says as much as all of them.
            await connection.execute("SELECT pg_notify($1, $2)", WORK_CHANNEL, orjson.dumps([freed[0]["id"]]).decode())
    except TROUBLE as error:
        logger.warning("could not unregister, the others will: %s", str(error) or type(error).__name__)


async def _beat_forever(connection: Any, worker_id: str, host: str, ttl_seconds: float) -> None:
    every_seconds = ttl_seconds / 3
    while True:
        await anyio.sleep(every_seconds)
        row = await connection.fetchval(
            "UPDATE workers SET heartbeat_at = clock_timestamp() WHERE id = $1 RETURNING 1",
            worker_id,
            timeout=every_seconds,
        )
        if row is None:
            raise TimeoutError("declared dead by another worker")
        await connection.execute(_HOST_LIVES, host, HOST_TTLS * ttl_seconds, timeout=every_seconds)
