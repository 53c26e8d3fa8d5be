"""Places for running sandboxes on a host: a bound, a queue for those it turns away, and sandboxes made ahead.

A place is taken in the transaction that makes a sandbox running in the database, under a lock of the host's, so that its workers
never exceed the bound together. Who waits renews a row; one that stops renewing has gone and is passed over. Fair is: the
workspace with the fewest running sandboxes is first, among equals who came first. Race: a session adopts a sandbox made ahead
while another does, or while it is being given up; taking its row out is the right to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text

from managed_agents.db.engine import Tx

WAIT_STALE_SECONDS = 5.0

# Stopped ones take nothing; what a newer generation replaced is about to be destroyed.
_RUNNING = """
    SELECT b.session_id, s.workspace_id FROM sandboxes b JOIN sessions s ON s.id = b.session_id
    WHERE b.host = :host AND b.state IN ('provisioning', 'live', 'stopping', 'paused')
      AND NOT EXISTS (SELECT 1 FROM sandboxes n WHERE n.session_id = b.session_id AND n.generation > b.generation)
"""
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('sandbox places ' || :host, 0))")
_USED = text(f"""
    SELECT (SELECT count(*) FROM ({_RUNNING}) AS r WHERE r.session_id <> :session_id)
        + (SELECT count(*) FROM pooled_sandboxes WHERE host = :host) AS used
""")
_WAIT = text("""
    INSERT INTO sandbox_waits (session_id, workspace_id, host)
    SELECT id, workspace_id, :host FROM sessions WHERE id = :session_id
    ON CONFLICT (session_id) DO UPDATE SET seen_at = clock_timestamp(), host = excluded.host,
        since = CASE WHEN sandbox_waits.seen_at < clock_timestamp() - make_interval(secs => :stale)
                     THEN clock_timestamp() ELSE sandbox_waits.since END
""")
_AHEAD = text(f"""
    WITH running AS (SELECT workspace_id, count(*) AS held FROM ({_RUNNING}) AS r GROUP BY 1),
    waiting AS (
        SELECT w.session_id, coalesce(r.held, 0) AS held, w.since FROM sandbox_waits w
        LEFT JOIN running r ON r.workspace_id = w.workspace_id
        WHERE w.host = :host AND w.seen_at > clock_timestamp() - make_interval(secs => :stale))
    SELECT count(*) FROM waiting o, waiting m
    WHERE m.session_id = :session_id AND (o.held, o.since, o.session_id) < (m.held, m.since, m.session_id)
""")
_ENTER = text("DELETE FROM sandbox_waits WHERE session_id = :session_id")
_WAITING = text(
    "SELECT count(*) FROM sandbox_waits WHERE host = :host AND seen_at > clock_timestamp() - make_interval(secs => :stale)"
)
_STALE = text("DELETE FROM sandbox_waits WHERE host = :host AND seen_at < clock_timestamp() - make_interval(secs => :stale)")
_ADOPT = text("""
    DELETE FROM pooled_sandboxes WHERE id = (
        SELECT p.id FROM pooled_sandboxes p WHERE p.host = :host AND p.fingerprint = :fingerprint AND p.ready
          AND NOT EXISTS (SELECT 1 FROM sandboxes b WHERE b.session_id = :session_id)
        ORDER BY p.created_at FOR UPDATE SKIP LOCKED LIMIT 1)
    RETURNING id
""")
_POOLED = text("SELECT id, environment_id, fingerprint, ready FROM pooled_sandboxes WHERE host = :host ORDER BY created_at")
_BEGIN = text(
    "INSERT INTO pooled_sandboxes (id, host, environment_id, fingerprint) VALUES (:id, :host, :environment_id, :fingerprint)"
)
_READY = text("UPDATE pooled_sandboxes SET ready = true WHERE id = :id")
_GIVE_UP = text("DELETE FROM pooled_sandboxes WHERE id = ANY(:ids) AND host = :host RETURNING id")
_OLD = text("""
    DELETE FROM pooled_sandboxes WHERE host = :host AND (
        ready AND created_at < clock_timestamp() - make_interval(secs => :ready_seconds)
        OR NOT ready AND created_at < clock_timestamp() - make_interval(secs => :making_seconds))
""")


@dataclass(frozen=True, slots=True)
class Pooled:
    """A sandbox made ahead, or being made."""

    id: str
    environment_id: str
    fingerprint: str
    ready: bool


async def enter(tx: Tx, session_id: str, *, host: str, running_max: int) -> bool:
    """Take a place for the session's sandbox, to be made running in the same transaction; False puts it into the queue.

    Commit in either case. 0 is no bound.
    """
    if not running_max:
        return True
    values = {"session_id": session_id, "host": host, "stale": WAIT_STALE_SECONDS}
    await tx.execute(_LOCK, {"host": host})
    await tx.execute(_WAIT, values)
    used: int = (await tx.execute(_USED, values)).scalar_one()
    ahead: int = (await tx.execute(_AHEAD, values)).scalar_one()
    if ahead >= running_max - used:
        return False
    await tx.execute(_ENTER, {"session_id": session_id})
    return True


async def leave(tx: Tx, session_id: str) -> None:
    """Leave the queue."""
    await tx.execute(_ENTER, {"session_id": session_id})


async def waiting(tx: Tx, *, host: str) -> int:
    """Sessions that wait for a place on this host; forgets those that went away."""
    values = {"host": host, "stale": WAIT_STALE_SECONDS}
    await tx.execute(_STALE, values)
    return (await tx.execute(_WAITING, values)).scalar_one()


# Made ahead


async def adopt(tx: Tx, session_id: str, *, host: str, fingerprint: str) -> str | None:
    """Take a sandbox made ahead out of the pool for a session's first; None when there is none. Nobody else gets it, ever."""
    return (await tx.execute(_ADOPT, {"session_id": session_id, "host": host, "fingerprint": fingerprint})).scalar_one_or_none()


async def pooled(tx: Tx, *, host: str) -> list[Pooled]:
    """The pool of this host, the oldest first."""
    return [Pooled(*row) for row in await tx.execute(_POOLED, {"host": host})]


async def begin_pooled(
    tx: Tx, sandbox_id: str, environment_id: str, *, host: str, fingerprint: str, pool_max: int, running_max: int
) -> bool:
    """Record a sandbox to be made ahead; False when the pool is full, or places are short."""
    await tx.execute(_LOCK, {"host": host})
    mine: Sequence[Pooled] = [each for each in await pooled(tx, host=host) if each.fingerprint == fingerprint]
    if len(mine) >= pool_max:
        return False
    if running_max:
        used: int = (await tx.execute(_USED, {"session_id": "", "host": host})).scalar_one()
        if used >= running_max or await waiting(tx, host=host):
            return False
    values = {"id": sandbox_id, "host": host, "environment_id": environment_id, "fingerprint": fingerprint}
    await tx.execute(_BEGIN, values)
    return True


async def set_ready(tx: Tx, sandbox_id: str) -> None:
    """Record that a sandbox made ahead takes calls; nothing happens to one that was given up."""
    await tx.execute(_READY, {"id": sandbox_id})


async def give_up(tx: Tx, sandbox_ids: Sequence[str], *, host: str) -> Sequence[str]:
    """Take sandboxes out of the pool, which the collector then destroys; returns those that nobody had adopted."""
    return list((await tx.execute(_GIVE_UP, {"ids": list(sandbox_ids), "host": host})).scalars())


async def expire(tx: Tx, *, host: str, ready_seconds: float, making_seconds: float) -> None:
    """Take out of the pool what is old, and what was never finished."""
    await tx.execute(_OLD, {"host": host, "ready_seconds": ready_seconds, "making_seconds": making_seconds})
