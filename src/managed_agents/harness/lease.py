"""Claims: which worker runs which session. All times are the database's.

A claim sets `owner` and raises `epoch`; every later append and every request to the hands carries both, and a lower epoch than
seen is refused. A worker proves that it lives in two ways: it heartbeats its own row, and it holds an advisory lock on that
same connection. The server frees the lock the moment the connection dies, so kill -9 is noticed at the next look; the
heartbeat's TTL covers a frozen or cut-off worker whose connection lingers.

A session may be what killed its worker. Each death (and each failure of the harness) without progress since the one before
counts; the next try waits longer, and a suspect, a session that has seen `SUSPECT_CRASHES` of them, is only run while no other
suspect is: so the one that kills is found out, and those that merely ran beside it get their chance to make progress. After
`limits.CRASHES_MAX` the turn is given up (`giving_up.py`). A restart of Postgres takes every worker's lock and is no death of
theirs: those that live on free their own sessions, which counts for nothing, and the others get a moment to do so.

Claim order, where more waits than there is room for: turns are dealt to workspaces like cards. A session's place is the number
of sessions of its workspace that run anywhere or have waited longer; the lowest place is claimed first, so a workspace with
a thousand sessions has no more of the room than one with three, unless nobody else wants it. Within a workspace the oldest
running period goes first, whatever was sent since: a session that has begun goes on before a new one starts, and a chatty
client cannot push its own session back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import text

from managed_agents.core import limits
from managed_agents.db.direct import Statement
from managed_agents.db.engine import Tx
from managed_agents.eventlog.append import HEAD_COLUMNS, head_of
from managed_agents.eventlog.head import Head
from managed_agents.eventlog.statements import VERSION_OF

SUSPECT_CRASHES = 2
HOST_CHANCE_SECONDS = 2.0  # for the host of a stopped sandbox, which starts faster than it is restored
RESTART_GRACE_SECONDS = 5.0  # for workers to come back to a Postgres that was restarted
LOCK_CLASS = 0x6D61  # first key of the two-key advisory locks: ours, among whatever else uses the database

_CLAIMABLE = """
    s.owner IS NULL AND s.deleted_at IS NULL
    AND EXISTS (SELECT 1 FROM workers WHERE id = :worker)
    AND (s.input_seq > s.handled_seq OR s.due_at <= clock_timestamp())
    AND (s.not_before IS NULL OR s.not_before <= clock_timestamp())
    AND (CAST(:ids AS text[]) IS NULL OR s.id = ANY(CAST(:ids AS text[])))
    -- A sandbox belongs to a host. While that lives, its workers have the session; one that is stopped, and so has a snapshot,
    -- is theirs for a moment only.
    AND coalesce((
        SELECT b.state NOT IN ('live', 'stopping', 'paused', 'stopped') OR b.host = (SELECT host FROM workers WHERE id = :worker)
            OR b.state = 'stopped'
                AND coalesce(s.running_since, s.updated_at) < clock_timestamp() - make_interval(secs => :chance)
            OR NOT EXISTS (SELECT 1 FROM hosts h WHERE h.name = b.host AND h.alive_until > clock_timestamp())
        FROM sandboxes b WHERE b.session_id = s.id ORDER BY b.generation DESC LIMIT 1), true)
"""
# An interrupt opens no running period, and may come while a retry is scheduled.
_SINCE = "least(s.due_at, coalesce(s.running_since, s.updated_at))"
_CLAIM = Statement(f"""
    WITH busy AS (SELECT workspace_id, count(*) AS turns FROM sessions WHERE owner IS NOT NULL GROUP BY workspace_id),
    waiting AS (
        SELECT s.id, {_SINCE} AS since,
            row_number() OVER (PARTITION BY s.workspace_id ORDER BY {_SINCE}, s.id) + coalesce(b.turns, 0) AS place
        FROM sessions s LEFT JOIN busy b ON b.workspace_id = s.workspace_id
        WHERE {_CLAIMABLE} AND s.crashes < {SUSPECT_CRASHES}),
    free AS (
        -- The conditions once more: they are checked again on the row as locked.
        SELECT s.id FROM sessions s JOIN waiting w ON w.id = s.id WHERE {_CLAIMABLE} AND s.crashes < {SUSPECT_CRASHES}
        ORDER BY w.place, w.since
        LIMIT :limit FOR UPDATE OF s SKIP LOCKED),
    suspect AS (
        SELECT s.id FROM sessions s WHERE {_CLAIMABLE} AND s.crashes >= {SUSPECT_CRASHES}
          AND NOT EXISTS (SELECT 1 FROM sessions o WHERE o.owner IS NOT NULL AND o.crashes >= {SUSPECT_CRASHES})
        ORDER BY s.not_before LIMIT 1 FOR UPDATE OF s SKIP LOCKED),
    chosen AS (SELECT id FROM suspect UNION ALL SELECT id FROM free LIMIT :limit)
    UPDATE sessions s SET owner = :worker, epoch = epoch + 1 FROM chosen WHERE s.id = chosen.id
    RETURNING s.id, s.workspace_id, s.epoch, s.input_seq, s.primary_thread_id, s.agent, s.crashes,
        extract(epoch FROM s.due_at - clock_timestamp())::float8 AS due_in_seconds,
        (SELECT v.config->'metadata'->>'managed_agents.harness' FROM agent_versions v
         WHERE v.agent_id = s.agent_id AND v.version = s.agent_version) AS harness,
        s.environment_config->'networking' AS networking, {HEAD_COLUMNS}, {VERSION_OF.format("s")}
""")
_CLAIM_COLUMNS = 10
# By owner, not by dead worker: a worker that was buried but has not noticed yet can still claim, and nobody would ever look
# for its sessions. The owner is compared again under the row's lock, because `living` is as old as the statement.
_FREE_DEAD = text("""
    WITH server AS (
        -- After the crash of one of its processes the server starts all of them again, the checkpointer too.
        SELECT greatest(pg_postmaster_start_time(),
            (SELECT max(backend_start) FROM pg_stat_activity WHERE backend_type = 'checkpointer')) AS started),
    waited_for AS (
        -- Every lock went with the former server. Workers that live on say so themselves, and free what they had.
        SELECT w.id FROM workers w, server WHERE w.heartbeat_at < server.started
          AND clock_timestamp() BETWEEN server.started AND server.started + make_interval(secs => :grace)),
    living AS (
        SELECT w.id FROM workers w
        WHERE w.heartbeat_at >= clock_timestamp() - make_interval(secs => :ttl)
          AND EXISTS (SELECT 1 FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = :lock_class
                      AND l.objid = w.lock_key AND l.objsubid = 2 AND l.granted
                      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))),
    orphaned AS (
        -- A frozen worker may hold rows in an open transaction: those are left until the server has ended it, and they
        -- must not keep the others waiting.
        SELECT id, owner FROM sessions WHERE owner IS NOT NULL
            AND owner NOT IN (SELECT id FROM living) AND owner NOT IN (SELECT id FROM waited_for)
        FOR UPDATE SKIP LOCKED),
    freed AS (
        UPDATE sessions s SET owner = NULL, epoch = s.epoch + 1, crashes = s.crashes + 1,
            -- The first death is nobody's fault: somebody else goes on at once.
            not_before = CASE WHEN s.crashes > 0 THEN clock_timestamp() + make_interval(secs =>
                least(:delay_max, 2 ^ (s.crashes - 1)) * (0.5 + random() / 2)) END
        FROM orphaned o
        WHERE s.id = o.id AND s.owner = o.owner RETURNING s.id),
    buried AS (
        DELETE FROM workers WHERE id IN (
            SELECT id FROM workers WHERE id NOT IN (SELECT id FROM living) AND id NOT IN (SELECT id FROM waited_for)
            FOR UPDATE SKIP LOCKED))
    SELECT id FROM freed
""")
# A plain statement: what failed may be the harness, or anything that an append would fold. The wake-up stays as it was, so a
# retry that was due is due again; only a session that cannot even be given up waits for new input.
_RECORD_FAILURE = text("""
    UPDATE sessions SET owner = NULL, epoch = epoch + 1,
        crashes = CASE WHEN crashes + 1 < :abandon THEN crashes + 1 ELSE 0 END,
        not_before = CASE WHEN crashes + 1 < :abandon THEN clock_timestamp() + make_interval(secs =>
            least(:delay_max, :first * 2 ^ crashes) * (0.5 + random() / 2)) END,
        handled_seq = CASE WHEN crashes + 1 < :abandon THEN handled_seq ELSE input_seq END,
        due_at = CASE WHEN crashes + 1 < :abandon THEN due_at END
    WHERE id = :id AND owner = :worker AND epoch = :epoch RETURNING crashes
""")
_AGENT = text("SELECT agent FROM sessions WHERE id = :id")
_OWNED_INPUT = text("SELECT id, input_seq, epoch FROM sessions WHERE owner = :worker")
_INPUT = Statement(
    "SELECT input_seq, extract(epoch FROM due_at - clock_timestamp())::float8 AS due_in_seconds FROM sessions "
    "WHERE id = :id AND deleted_at IS NULL"
)


@dataclass(frozen=True, slots=True)
class Claim:
    """A session this worker owns, as it was when claimed."""

    session_id: str
    workspace_id: str
    epoch: int
    input_seq: int
    thread_id: str
    agent: dict[str, Any]
    crashes: int
    due_in_seconds: float | None
    # The harness that the agent asks for in its metadata (`managed_agents.harness`).
    harness: str | None = None
    # That of the environment when the session was created.
    networking: Mapping[str, Any] = field(default_factory=lambda: {"type": "unrestricted"})


async def claim(
    tx: Tx, worker_id: str, *, limit: int, session_ids: Sequence[str] | None = None
) -> tuple[list[Claim], list[tuple[Head, str]]]:
    """Claim up to `limit` sessions that have work and no owner, in the order that the module describes.

    `session_ids` narrows it to sessions a doorbell named. Beside the claims: the heads and versions of the rows they wrote, to
    write from.
    """
    rows = await _CLAIM.rows(
        tx,
        {
            "worker": worker_id,
            "limit": limit,
            "ids": None if session_ids is None else list(session_ids),
            "chance": HOST_CHANCE_SECONDS,
        },
    )
    heads = [(head_of(row[_CLAIM_COLUMNS:-1]), row[-1]) for row in rows]
    return [Claim(*row[:_CLAIM_COLUMNS]) for row in rows], heads


async def free_dead(tx: Tx, *, ttl_seconds: float) -> list[str]:
    """Take the sessions of dead workers from them and bury the workers. Returns the sessions that became free.

    A worker is dead when its heartbeat is older than `ttl_seconds`, its advisory lock is gone, or its row is.
    """
    rows = await tx.execute(
        _FREE_DEAD,
        {
            "ttl": ttl_seconds,
            "lock_class": LOCK_CLASS,
            "delay_max": limits.CRASH_DELAY_SECONDS_MAX,
            "grace": RESTART_GRACE_SECONDS,
        },
    )
    return [row.id for row in rows]


async def record_failure(tx: Tx, claim: Claim, worker_id: str) -> int | None:
    """Give the session back after a failure of our own or of a harness, to be tried again later.

    Returns how many there were in a row now; 0 when the session was left alone, because even giving its turn up failed
    `limits.CRASHES_MAX` times; None when it was not the worker's any more.
    """
    values = {
        "id": claim.session_id,
        "worker": worker_id,
        "epoch": claim.epoch,
        "abandon": 2 * limits.CRASHES_MAX,
        "first": limits.CRASH_DELAY_FIRST_SECONDS,
        "delay_max": limits.CRASH_DELAY_SECONDS_MAX,
    }
    return (await tx.execute(_RECORD_FAILURE, values)).scalar_one_or_none()


async def owned_input(tx: Tx, worker_id: str) -> dict[str, tuple[int, int]]:
    """`input_seq` and `epoch` of every session the worker owns: the poll behind the doorbell."""
    return {row.id: (row.input_seq, row.epoch) for row in await tx.execute(_OWNED_INPUT, {"worker": worker_id})}


async def current_agent(tx: Tx, session_id: str) -> dict[str, Any]:
    """The session's agent as it is now: a session that is idle can get other tools."""
    return (await tx.execute(_AGENT, {"id": session_id})).scalar_one()


async def current_input(tx: Tx, session_id: str) -> tuple[int, float | None] | None:
    """`input_seq` and the seconds until a scheduled retry; None when the session was deleted."""
    rows = await _INPUT.rows(tx, {"id": session_id})
    return (rows[0][0], rows[0][1]) if rows else None
