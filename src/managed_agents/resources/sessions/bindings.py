"""Rows that bind sandboxes to sessions, and the resources to put into them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import text

from managed_agents.core import ids
from managed_agents.db.engine import Tx


@dataclass(frozen=True, slots=True)
class Binding:
    """A sandbox of a session. `state` is provisioning or live; `mounts` is path → SHA-256 of the files put into it."""

    sandbox_id: str
    session_id: str
    generation: int
    host: str
    state: str
    mounts: Mapping[str, str]
    networking: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to be mounted: where, and which blob."""

    path: str
    sha256: str
    size: int


_COLUMNS = "id, session_id, generation, host, state, mounts, networking"
_CURRENT = text(
    f"SELECT {_COLUMNS} FROM sandboxes WHERE session_id = :session_id AND state <> 'destroyed' ORDER BY generation DESC LIMIT 1"
)
_BIND = text(f"""
    INSERT INTO sandboxes (id, session_id, generation, host, state, networking)
    SELECT :id, s.id, coalesce((SELECT max(generation) FROM sandboxes WHERE session_id = s.id), 0) + 1, :host,
        'provisioning', (SELECT e.config -> 'networking' FROM environments e WHERE e.id = s.environment_id)
    FROM sessions s WHERE s.id = :session_id AND s.epoch = :epoch AND s.deleted_at IS NULL
    RETURNING {_COLUMNS}
""")
_SET_MOUNTS = text("UPDATE sandboxes SET mounts = CAST(:mounts AS jsonb) WHERE id = :id")
_SET_STATE = text("UPDATE sandboxes SET state = :state, last_used_at = clock_timestamp() WHERE id = :id")
_TOUCH = text("UPDATE sandboxes SET last_used_at = clock_timestamp() WHERE id = :id")
_UPLOADS = text(
    "SELECT r.sandbox_path, f.sha256, f.size_bytes FROM session_resources r JOIN files f ON f.id = r.file_id "
    "WHERE r.session_id = :session_id AND r.type = 'file' ORDER BY r.created_at, r.id"
)
_OUTPUTS = text("SELECT output_path, sha256 FROM files WHERE session_id = :session_id AND output_path IS NOT NULL")
_UNUSED = text(f"""
    SELECT {_COLUMNS} FROM sandboxes b
    WHERE host = :host AND state = 'live' AND last_used_at < clock_timestamp() - make_interval(secs => :idle)
      -- One that runs and is owned by nobody was given up in mid-turn: its calls go on, and the next owner collects them.
      AND EXISTS (SELECT 1 FROM sessions s WHERE s.id = b.session_id AND s.owner IS NULL AND s.status <> 'running')
    ORDER BY last_used_at LIMIT 50
""")
_DOOMED = text(f"""
    SELECT {_COLUMNS} FROM sandboxes b
    WHERE host = :host AND state <> 'destroyed'
      AND (NOT EXISTS (SELECT 1 FROM sessions s WHERE s.id = b.session_id AND s.deleted_at IS NULL
                       AND s.archived_at IS NULL)
           OR EXISTS (SELECT 1 FROM sandboxes n WHERE n.session_id = b.session_id AND n.generation > b.generation))
    ORDER BY created_at LIMIT 50
""")
_WORKERS = text("SELECT count(*) FROM workers WHERE host = :host")
_KNOWN = text("SELECT id, generation FROM sandboxes WHERE host = :host AND state <> 'destroyed'")


async def current(tx: Tx, session_id: str) -> Binding | None:
    """The session's newest sandbox that was not destroyed."""
    row = (await tx.execute(_CURRENT, {"session_id": session_id})).one_or_none()
    return None if row is None else Binding(*row)


async def bind(tx: Tx, session_id: str, *, epoch: int, host: str) -> Binding | None:
    """Bind a new sandbox of the next generation, as `provisioning`. None when `epoch` is no longer the session's."""
    values = {"id": ids.new_id(ids.SANDBOX), "session_id": session_id, "epoch": epoch, "host": host}
    row = (await tx.execute(_BIND, values)).one_or_none()
    return None if row is None else Binding(*row)


async def set_state(tx: Tx, sandbox_id: str, state: str) -> None:
    """Record that the sandbox is `live` or `destroyed`."""
    await tx.execute(_SET_STATE, {"id": sandbox_id, "state": state})


async def set_mounts(tx: Tx, sandbox_id: str, mounts: Mapping[str, str]) -> None:
    """Record which files the sandbox holds now."""
    await tx.execute(_SET_MOUNTS, {"id": sandbox_id, "mounts": orjson.dumps(dict(mounts)).decode()})


async def touch(tx: Tx, sandbox_id: str) -> None:
    """Record that the sandbox was used now."""
    await tx.execute(_TOUCH, {"id": sandbox_id})


async def uploads(tx: Tx, session_id: str) -> list[Upload]:
    """Files mounted into the session."""
    return [Upload(*row) for row in await tx.execute(_UPLOADS, {"session_id": session_id})]


async def outputs(tx: Tx, session_id: str) -> dict[str, str]:
    """Outputs collected so far: path below the outputs directory → SHA-256."""
    return {row.output_path: row.sha256 for row in await tx.execute(_OUTPUTS, {"session_id": session_id})}


async def unused(tx: Tx, *, host: str, idle_seconds: float) -> list[Binding]:
    """Live sandboxes of this host whose session rests and which nobody used for `idle_seconds`."""
    return [Binding(*row) for row in await tx.execute(_UNUSED, {"host": host, "idle": idle_seconds})]


async def doomed(tx: Tx, *, host: str) -> list[Binding]:
    """Sandboxes of this host to be destroyed: session gone or archived, or a newer generation exists."""
    return [Binding(*row) for row in await tx.execute(_DOOMED, {"host": host})]


async def known(tx: Tx, *, host: str) -> set[tuple[str, int]]:
    """Id and generation of every sandbox that may exist on this host."""
    rows: Sequence[tuple[str, int]] = [(row.id, row.generation) for row in await tx.execute(_KNOWN, {"host": host})]
    return set(rows)


async def workers_on(tx: Tx, *, host: str) -> int:
    """Registered workers of this host."""
    return (await tx.execute(_WORKERS, {"host": host})).scalar_one()
