"""Rows that bind sandboxes to sessions, and the resources to put into them.

States: `provisioning` (never got a call), `live`, `paused` (its processes are frozen), `stopping` (the collector has claimed
the right to stop it; whoever wants it waits), `stopped` (nothing runs, the disk is kept), `destroyed` (what there is of it may
go). Race: a session is claimed while its sandbox is being stopped. The stop is claimed by a statement that fails once anybody
used the sandbox, and using it is a statement that fails while it is being stopped. A pause takes milliseconds, and is made
under the row's lock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

import orjson
from sqlalchemy import text

from managed_agents.core import ids, limits
from managed_agents.db.engine import Tx
from managed_agents.resources.sessions import places, snapshots

RESTORED = (
    "[The sandbox was lost and replaced. Files in /workspace, the home directory and /mnt/session/outputs, and the shell, are as "
    "of {}. What changed later, /tmp and running processes are gone.]"
)
FRESH = "[The sandbox was lost and replaced by a fresh one. Files that were in it and running processes are gone.]"
MAKING_SECONDS = 60.0  # a turn without calls may end while its sandbox is being made, for the next one to have it

Packages = Mapping[str, Sequence[str]]
"""By manager."""
State = Literal["provisioning", "live", "stopping", "paused", "stopped", "destroyed"]


@dataclass(frozen=True, slots=True)
class Binding:
    """A sandbox of a session. `mounts` is path → SHA-256 of the files put into it, `note` what the model is to be told."""

    sandbox_id: str
    session_id: str
    generation: int
    host: str
    state: State
    mounts: Mapping[str, str]
    networking: Mapping[str, Any]
    note: str | None
    last_used_at: datetime
    used: bool


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to be mounted: where, and which blob."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Output:
    """What was taken from a path below the outputs directory."""

    path: str
    sha256: str
    size: int
    deleted: bool


_COLUMNS = "id, session_id, generation, host, state, mounts, networking, note, last_used_at, used_at IS NOT NULL AS used"
_CURRENT = text(
    f"SELECT {_COLUMNS} FROM sandboxes WHERE session_id = :session_id AND state <> 'destroyed' ORDER BY generation DESC LIMIT 1"
)
# A session keeps the environment it began with.
_PACKAGES = text("SELECT environment_id, environment_config->'packages' AS packages FROM sessions WHERE id = :session_id")
_ENVIRONMENTS = text("SELECT id, config->'packages' AS packages FROM environments WHERE id = ANY(:ids) AND archived_at IS NULL")
_BIND = text(f"""
    INSERT INTO sandboxes (id, session_id, generation, host, state, networking, packages, note, since)
    SELECT :id, s.id, coalesce((SELECT max(generation) FROM sandboxes WHERE session_id = s.id), 0) + 1, :host, 'provisioning',
        s.environment_config -> 'networking', s.environment_config -> 'packages', CAST(:note AS text),
        coalesce((SELECT n.since FROM sandbox_snapshots n WHERE n.session_id = s.id
                  AND n.since > clock_timestamp() - make_interval(secs => :kept)), clock_timestamp())
    FROM sessions s WHERE s.id = :session_id AND s.epoch = :epoch AND s.deleted_at IS NULL
    RETURNING {_COLUMNS}
""")
# What calls of earlier sandboxes may have done, and what of it the model was not told yet.
_BEFORE = text("""
    SELECT max(used_at) AS used_at,
        (SELECT note FROM sandboxes WHERE session_id = :session_id ORDER BY generation DESC LIMIT 1) AS note
    FROM sandboxes WHERE session_id = :session_id
""")
_SET_MOUNTS = text("UPDATE sandboxes SET mounts = CAST(:mounts AS jsonb) WHERE id = :id")
_DESTROYED = text("UPDATE sandboxes SET state = 'destroyed' WHERE id = :id")
_LIVE = text("UPDATE sandboxes SET state = 'live', last_used_at = clock_timestamp() WHERE id = :id AND state = 'provisioning'")
_TAKE = text(
    "UPDATE sandboxes SET state = 'live', last_used_at = clock_timestamp(), "
    # One that never got a call holds nothing that could be lost.
    "used_at = CASE WHEN used_at IS NOT NULL THEN clock_timestamp() END "
    "WHERE id = :id AND (state IN ('live', 'paused', 'stopped') OR state = 'stopping' AND :force)"
)
_TOUCH = text("UPDATE sandboxes SET last_used_at = clock_timestamp(), used_at = clock_timestamp() WHERE id = :id")
_TOLD = text("UPDATE sandboxes SET note = NULL WHERE id = :id")
_UPLOADS = text(
    "SELECT r.sandbox_path, f.sha256, f.size_bytes FROM session_resources r JOIN files f ON f.id = r.file_id "
    "WHERE r.session_id = :session_id AND r.type = 'file' ORDER BY r.created_at, r.id"
)
_OUTPUTS = text("""
    SELECT output_path, sha256, size_bytes, false AS deleted FROM files
    WHERE session_id = :session_id AND output_path IS NOT NULL
    UNION ALL SELECT output_path, sha256, 0, true FROM deleted_outputs WHERE session_id = :session_id
""")
_UNUSED = text(f"""
    SELECT {_COLUMNS} FROM sandboxes b
    WHERE host = :host AND last_used_at < clock_timestamp() - make_interval(secs => :idle)
      -- One that runs though it is `stopped` was started again by a stop that came too late.
      AND (state = ANY(:states) OR state = 'stopped' AND id = ANY(:running))
      AND (last_used_at, id) > (coalesce(CAST(:behind_at AS timestamptz), '-infinity'), CAST(:behind_id AS text))
      -- One that runs and is owned by nobody was given up in mid-turn: its calls go on, and the next owner collects them.
      AND EXISTS (SELECT 1 FROM sessions s WHERE s.id = b.session_id AND s.owner IS NULL AND s.status <> 'running')
    ORDER BY last_used_at, id LIMIT :count
""")
_STOPPING = text("""
    UPDATE sandboxes b SET state = 'stopping' WHERE id = :id AND state = :state AND last_used_at = :seen
      AND EXISTS (SELECT 1 FROM sessions s WHERE s.id = b.session_id AND s.owner IS NULL AND s.status <> 'running')
""")
_STOPPED = text("UPDATE sandboxes SET state = :state WHERE id = :id AND state = 'stopping'")
_TO_PAUSE = text("""
    SELECT 1 FROM sandboxes b WHERE id = :id AND state = 'live' AND last_used_at = :seen
      AND EXISTS (SELECT 1 FROM sessions s WHERE s.id = b.session_id AND s.owner IS NULL AND s.status <> 'running')
    FOR UPDATE OF b SKIP LOCKED
""")
_PAUSED = text("UPDATE sandboxes SET state = 'paused' WHERE id = :id")
_DOOM = text("""
    UPDATE sandboxes b SET state = 'destroyed'
    WHERE host = :host AND state <> 'destroyed'
      AND (NOT EXISTS (SELECT 1 FROM sessions s WHERE s.id = b.session_id AND s.deleted_at IS NULL
                       AND s.archived_at IS NULL)
           OR EXISTS (SELECT 1 FROM sandboxes n WHERE n.session_id = b.session_id AND n.generation > b.generation)
           OR b.since <= clock_timestamp() - make_interval(secs => :kept)
              AND EXISTS (SELECT 1 FROM sessions s WHERE s.id = b.session_id AND s.owner IS NULL AND s.status <> 'running')
           -- Whoever was making it has died, and nobody asked for it since.
           OR b.state = 'provisioning' AND b.created_at < clock_timestamp() - make_interval(secs => :making)
              AND EXISTS (SELECT 1 FROM sessions s WHERE s.id = b.session_id AND s.owner IS NULL AND s.status <> 'running')
           -- Everything in it is in its snapshot: nobody ran anything in it since, or at all.
           OR b.state = 'stopped' AND b.last_used_at < clock_timestamp() - make_interval(secs => :parked)
              AND (b.used_at IS NULL OR EXISTS (SELECT 1 FROM sandbox_snapshots n WHERE n.session_id = b.session_id
                          AND n.generation = b.generation AND n.taken_at >= b.used_at)))
""")
_WORKERS = text("SELECT count(*) FROM workers WHERE host = :host")
# One made ahead is of the first generation, and is adopted as such.
_KNOWN = text("""
    SELECT id, generation FROM sandboxes WHERE host = :host AND state <> 'destroyed'
    UNION ALL SELECT id, 1 FROM pooled_sandboxes WHERE host = :host
""")


async def current(tx: Tx, session_id: str) -> Binding | None:
    """The session's newest sandbox that was not destroyed."""
    row = (await tx.execute(_CURRENT, {"session_id": session_id})).one_or_none()
    return None if row is None else Binding(*row)


async def bind(tx: Tx, session_id: str, *, epoch: int, host: str, fingerprint: str, fresh: bool = False) -> Binding | None:
    """Bind a new sandbox of the next generation, as `provisioning`, or one made ahead like `fingerprint`. `fresh`: the session's
    snapshot is not going to be restored into it.

    None when `epoch` is no longer the session's: roll back.
    """
    adopted = await places.adopt(tx, session_id, host=host, fingerprint=fingerprint)
    before = (await tx.execute(_BEFORE, {"session_id": session_id})).one()
    note: str | None = before.note
    if before.used_at is not None:
        snapshot = None if fresh else await snapshots.latest(tx, session_id)
        if snapshot is None:
            note = FRESH
        elif snapshot.taken_at < before.used_at:
            note = RESTORED.format(f"{snapshot.taken_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC")
    values = {"id": adopted or ids.new_id(ids.SANDBOX), "session_id": session_id, "epoch": epoch, "host": host, "note": note}
    kept = 0.0 if fresh else limits.SANDBOX_STATE_SECONDS
    row = (await tx.execute(_BIND, {**values, "kept": kept})).one_or_none()
    return None if row is None else Binding(*row)


async def packages(tx: Tx, session_id: str) -> tuple[str, Packages]:
    """The session's environment, and what its sandboxes have installed."""
    row = (await tx.execute(_PACKAGES, {"session_id": session_id})).one()
    return row.environment_id, _packages(row.packages)


async def packages_of_environments(tx: Tx, environment_ids: Sequence[str]) -> dict[str, Packages]:
    """What new sandboxes of environments have installed, for those that are in use."""
    rows = (await tx.execute(_ENVIRONMENTS, {"ids": list(environment_ids)})).all()
    return {row.id: _packages(row.packages) for row in rows}


def _packages(found: Mapping[str, Any] | None) -> Packages:
    return {manager: cast(list[str], names) for manager, names in (found or {}).items() if isinstance(names, list) and names}


async def set_live(tx: Tx, sandbox_id: str) -> None:
    """Record that a provisioned sandbox takes calls."""
    await tx.execute(_LIVE, {"id": sandbox_id})


async def set_destroyed(tx: Tx, sandbox_id: str) -> None:
    """Record that nobody needs the sandbox: the collector of its host destroys what there is of it."""
    await tx.execute(_DESTROYED, {"id": sandbox_id})


async def take(tx: Tx, sandbox_id: str, *, force: bool) -> bool:
    """Make a sandbox `live` for its session's owner; False while it is being stopped, unless `force`."""
    return (await tx.execute(_TAKE, {"id": sandbox_id, "force": force})).rowcount == 1


async def told(tx: Tx, sandbox_id: str) -> None:
    """Record that the model knows what it had to be told of the sandbox."""
    await tx.execute(_TOLD, {"id": sandbox_id})


async def set_mounts(tx: Tx, sandbox_id: str, mounts: Mapping[str, str]) -> None:
    """Record which files the sandbox holds now."""
    await tx.execute(_SET_MOUNTS, {"id": sandbox_id, "mounts": orjson.dumps(dict(mounts)).decode()})


async def touch(tx: Tx, sandbox_id: str) -> None:
    """Record that the sandbox was used now."""
    await tx.execute(_TOUCH, {"id": sandbox_id})


async def uploads(tx: Tx, session_id: str) -> list[Upload]:
    """Files mounted into the session."""
    return [Upload(*row) for row in await tx.execute(_UPLOADS, {"session_id": session_id})]


async def outputs(tx: Tx, session_id: str) -> list[Output]:
    """Outputs collected so far, those that a client deleted since among them."""
    return [Output(*row) for row in await tx.execute(_OUTPUTS, {"session_id": session_id})]


async def unused(
    tx: Tx,
    *,
    host: str,
    idle_seconds: float,
    count: int = 50,
    states: Sequence[State] = ("live", "stopping", "paused"),
    running: Sequence[str] = (),
    behind: Binding | None = None,
) -> list[Binding]:
    """Sandboxes of this host that should not run: the session rests and nobody used it for `idle_seconds`, the longest unused
    first; `behind` one that was returned before. Those in `states`, and of the stopped ones those that are in `running`.
    """
    values = {"host": host, "idle": idle_seconds, "count": count, "states": list(states), "running": list(running)}
    values |= {"behind_at": behind and behind.last_used_at, "behind_id": behind.sandbox_id if behind else ""}
    return [Binding(*row) for row in await tx.execute(_UNUSED, values)]


async def begin_stop(tx: Tx, binding: Binding) -> bool:
    """Claim the right to stop a sandbox; False when it was used since `binding` was read, or its session has an owner."""
    values = {"id": binding.sandbox_id, "seen": binding.last_used_at, "state": binding.state}
    return (await tx.execute(_STOPPING, values)).rowcount == 1


async def set_stopped(tx: Tx, sandbox_id: str, *, gone: bool = False) -> None:
    """Record that a sandbox that was `stopping` has stopped; `gone`: nothing of it is left."""
    await tx.execute(_STOPPED, {"id": sandbox_id, "state": "destroyed" if gone else "stopped"})


async def begin_pause(tx: Tx, binding: Binding) -> bool:
    """Keep everybody from a sandbox until `tx` ends; False when it was used since `binding` was read, or its session is owned."""
    return (await tx.execute(_TO_PAUSE, {"id": binding.sandbox_id, "seen": binding.last_used_at})).one_or_none() is not None


async def set_paused(tx: Tx, sandbox_id: str) -> None:
    """Record that a sandbox is paused."""
    await tx.execute(_PAUSED, {"id": sandbox_id})


async def doom(tx: Tx, *, host: str, parked_seconds: float) -> None:
    """Mark as destroyed the sandboxes of this host whose session is gone or archived, whose state is too old, that a newer
    generation replaced, that nobody goes on making, and that have been stopped for `parked_seconds` and are in a snapshot.
    """
    values = {"host": host, "parked": parked_seconds, "kept": limits.SANDBOX_STATE_SECONDS, "making": MAKING_SECONDS}
    await tx.execute(_DOOM, values)


async def known(tx: Tx, *, host: str) -> set[tuple[str, int]]:
    """Id and generation of every sandbox that may exist on this host."""
    rows: Sequence[tuple[str, int]] = [(row.id, row.generation) for row in await tx.execute(_KNOWN, {"host": host})]
    return set(rows)


async def workers_on(tx: Tx, *, host: str) -> int:
    """Registered workers of this host."""
    return (await tx.execute(_WORKERS, {"host": host})).scalar_one()
