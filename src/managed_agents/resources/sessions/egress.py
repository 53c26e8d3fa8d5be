"""What the egress gateway asks of the database, and tells it: policies of sandboxes, and what they reached.

A policy is the environment's networking as it was when the sandbox was bound. The hosts of `allow_mcp_servers` are those of the
agent's servers at any time; those of `allow_package_managers` come from the sandbox image and the operator.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import orjson
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.core.errors import NotFound
from managed_agents.db.engine import Database
from managed_agents.egress.access_log import Access, LogFailed
from managed_agents.egress.policy import Binding, Policy, PolicyUnknown, normal_host

KEPT_ENTRIES = 1000

_POLICY = text("""
    SELECT s.id, b.networking, s.agent -> 'mcp_servers' AS mcp_servers,
        (SELECT CAST(sum(e.egress_bytes) AS bigint) FROM sandboxes e WHERE e.session_id = s.id) AS egress_bytes
    FROM sandboxes b JOIN sessions s ON s.id = b.session_id
    WHERE b.id = :id AND b.generation = :generation AND b.state <> 'destroyed' AND s.deleted_at IS NULL
""")
# Entries of sandboxes whose session was erased meanwhile are nobody's. Their ids are given in the order of the sort.
_WRITE = text("""
    INSERT INTO egress_log
        (session_id, sandbox_id, generation, at, protocol, host, port, outcome, bytes_sent, bytes_received, seconds)
    SELECT e.session_id, e.sandbox_id, e.generation, e.at, e.protocol, e.host, e.port, e.outcome, e.bytes_sent,
        e.bytes_received, e.seconds
    FROM jsonb_to_recordset(CAST(:entries AS jsonb)) AS e(session_id text, sandbox_id text, generation integer,
        at timestamptz, protocol text, host text, port integer, outcome text, bytes_sent bigint, bytes_received bigint,
        seconds double precision)
    WHERE EXISTS (SELECT 1 FROM sandboxes b WHERE b.id = e.sandbox_id)
    ORDER BY e.at
""")
_COUNT = text("""
    UPDATE sandboxes b SET egress_bytes = b.egress_bytes + u.bytes
    FROM jsonb_to_recordset(CAST(:used AS jsonb)) AS u(id text, bytes bigint) WHERE b.id = u.id
""")
_SESSION = text("SELECT id FROM sessions WHERE id = :id AND deleted_at IS NULL")
_READ = text("""
    SELECT session_id, sandbox_id, generation, at, protocol, host, port, outcome, bytes_sent, bytes_received, seconds
    FROM egress_log WHERE session_id = :id ORDER BY id DESC LIMIT :limit
""")
_TRIM = text("""
    DELETE FROM egress_log l USING (
        SELECT w.id AS session_id,
            (SELECT k.id FROM egress_log k WHERE k.session_id = w.id ORDER BY k.id DESC OFFSET :kept LIMIT 1) AS last
        FROM unnest(CAST(:session_ids AS text[])) AS w(id)
    ) AS old WHERE l.session_id = old.session_id AND l.id <= old.last
""")


async def accesses(db: Database, session_id: str, *, limit: int = KEPT_ENTRIES) -> list[Access]:
    """What a session's sandboxes asked for, the oldest first: the newest `limit` of what is kept.

    Raises: NotFound.
    """
    async with db.transaction() as tx:
        if (await tx.execute(_SESSION, {"id": session_id})).one_or_none() is None:
            raise NotFound(f"Session not found: {session_id}")
        rows = (await tx.execute(_READ, {"id": session_id, "limit": limit})).mappings().all()
    return [Access(**row) for row in reversed(rows)]


class StoredPolicies:
    """`EgressPolicy` and `AccessStore` over the database."""

    def __init__(
        self,
        db: Database,
        package_hosts: Callable[[], Awaitable[Iterable[str]]],
        bindings: Callable[[str], Awaitable[Sequence[Binding]]],
    ) -> None:
        """`package_hosts` tells the hosts that `allow_package_managers` opens, `bindings` what a session has credentials for."""
        self._db, self._package_hosts, self._bindings = db, package_hosts, bindings

    async def policy(self, sandbox_id: str, generation: int) -> Policy | None:
        """As `EgressPolicy.policy`."""
        try:
            async with self._db.transaction() as tx:
                row = (await tx.execute(_POLICY, {"id": sandbox_id, "generation": generation})).one_or_none()
            if row is None:
                return None
            networking: Mapping[str, Any] = row.networking
            packages = await self._package_hosts() if networking.get("allow_package_managers") else ()
            bindings = await self._bindings(row.id)
        except (SQLAlchemyError, OSError) as error:
            raise PolicyUnknown(str(error)) from error
        policy = policy_of(row.id, networking, row.mcp_servers or (), packages, row.egress_bytes)
        return dataclasses.replace(policy, bindings=tuple(bindings))

    async def write(self, entries: Sequence[Access], traffic: Mapping[str, int]) -> None:
        """As `AccessStore.write`."""
        counted = [{"id": key, "bytes": size} for key, size in sorted(traffic.items()) if size]
        try:
            async with self._db.transaction() as tx:
                await tx.execute(_WRITE, {"entries": orjson.dumps([asdict(entry) for entry in entries]).decode()})
                await tx.execute(_COUNT, {"used": orjson.dumps(counted).decode()})
                await tx.execute(_TRIM, {"session_ids": sorted({entry.session_id for entry in entries}), "kept": KEPT_ENTRIES})
        except (SQLAlchemyError, OSError) as error:
            raise LogFailed(f"{type(error).__name__}: {error}") from error


def policy_of(
    session_id: str,
    networking: Mapping[str, Any],
    mcp_servers: Iterable[Mapping[str, Any]],
    package_hosts: Iterable[str],
    bytes_before: int = 0,
) -> Policy:
    """The policy of a session's sandbox."""
    if networking["type"] == "unrestricted":
        return Policy(session_id, "unrestricted", bytes_before=bytes_before)
    hosts = list(networking.get("allowed_hosts", ()))
    if networking.get("allow_mcp_servers"):
        hosts += [host for server in mcp_servers if (host := _host_of(server.get("url")))]
    if networking.get("allow_package_managers"):
        hosts += package_hosts
    return Policy(session_id, "limited", tuple(dict.fromkeys(hosts)), bytes_before=bytes_before)


def _host_of(url: object) -> str | None:
    try:
        return normal_host(urlsplit(url).hostname or "") if isinstance(url, str) else None
    except ValueError:
        return None
