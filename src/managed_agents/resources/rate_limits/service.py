"""What the rate limits are: the organisation's from the settings, and overrides of workspaces.

differs: the hosted endpoints list the limits of the Messages API, by model. This server has none of these; it lists its own
two, in the same shape: one entry for create requests, one for read requests, each with `requests_per_minute`.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert as upsert

from managed_agents.core import ids
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.keys.rights import ring
from managed_agents.resources.organizations.service import organization_only, retrieve_within
from managed_agents.resources.rate_limits.schemas import (
    ListRateLimitsQuery,
    ListWorkspaceRateLimitsQuery,
    UpdateWorkspaceRateLimit,
)
from managed_agents.resources.rate_limits.tables import WorkspaceRateLimitRow
from managed_agents.web.actor import RateKind, Reach
from managed_agents.web.pagination import decode_cursor, encode_cursor

Limits = Mapping[RateKind, int]

LIMITER = "requests_per_minute"
GROUP_TYPE = "model_group"  # the one group of the SDK's union that carries a name for people
DISPLAY_NAMES = {RateKind.CREATE: "Managed Agents: create requests", RateKind.READ: "Managed Agents: read requests"}


def rate_limit_id(organization_id: str, kind: RateKind) -> str:
    """Return the id of an entry: the same for as long as the organisation lives (spec: OrganizationRateLimit.id)."""
    return ids.derived_id(ids.RATE_LIMIT, organization_id, kind.value)


def organization_page(organization_id: str, limits: Limits, query: ListRateLimitsQuery) -> dict[str, Any]:
    """Return the organisation's limits. Raises `NotFound` for a model: no entry is a model's."""
    if query.model is not None:
        raise NotFound(f"model: {query.model[:100]} has no rate limits")
    entries = [
        {
            "id": rate_limit_id(organization_id, kind),
            "type": "rate_limit",
            "group": _group(kind),
            "limits": [{"type": LIMITER, "value": value}],
            "models": [],
        }
        for kind, value in limits.items()
    ]
    return _page("rate_limits", entries, query)


async def workspace_page(
    db: Database, reach: Reach, workspace_id: str, limits: Limits, query: ListWorkspaceRateLimitsQuery
) -> dict[str, Any]:
    """Return a workspace's overrides, and what it inherits where asked. Raises `NotFound`."""
    async with db.autocommit() as tx:
        await retrieve_within(tx, reach, workspace_id)
        overrides = await _overrides(tx, workspace_id)
    entries = [
        _workspace_entry(reach.organization_id, workspace_id, kind, overrides.get(kind), value)
        for kind, value in limits.items()
        if kind in overrides or query.include_inherited
    ]
    return _page("workspace_rate_limits", entries, query)


async def update_workspace(
    db: Database, reach: Reach, workspace_id: str, entry_id: str, limits: Limits, command: UpdateWorkspaceRateLimit
) -> dict[str, Any]:
    """Set or clear overrides of one group, everywhere at once. Raises `NotFound`, `PermissionDenied`."""
    kinds = {rate_limit_id(reach.organization_id, kind): kind for kind in limits}
    async with db.transaction() as tx:
        await retrieve_within(tx, reach, workspace_id, lock=True)
        organization_only(reach)
        if entry_id not in kinds:
            raise NotFound("Rate limit not found.")
        kind = kinds[entry_id]
        for index, limit in enumerate(command.limits):
            if limit.type != LIMITER:
                raise InvalidRequest(f"limits.{index}.type: {limit.type!r} does not apply to this group, only {LIMITER!r}")
            await set_override(tx, workspace_id, kind, limit.value)
        await ring(tx, workspace_id)
        override = (await _overrides(tx, workspace_id)).get(kind)
    entry = _workspace_entry(reach.organization_id, workspace_id, kind, override, limits[kind])
    if override is None:
        entry["limits"] = []
    return entry


async def set_override(tx: Tx, workspace_id: str, kind: RateKind, value: int | None) -> None:
    """Set an override, or clear it. The caller rings."""
    if value is None:
        row = WorkspaceRateLimitRow.workspace_id == workspace_id, WorkspaceRateLimitRow.kind == kind.value
        await tx.execute(delete(WorkspaceRateLimitRow).where(*row))
        return
    statement = upsert(WorkspaceRateLimitRow).values(workspace_id=workspace_id, kind=kind.value, requests_per_minute=value)
    key = (WorkspaceRateLimitRow.workspace_id, WorkspaceRateLimitRow.kind)
    await tx.execute(statement.on_conflict_do_update(index_elements=key, set_={"requests_per_minute": value}))


async def override(db: Database, reach: Reach, workspace_id: str, wanted: Mapping[RateKind, int | None]) -> None:
    """Set or clear overrides, everywhere at once; for operators. Raises `NotFound`."""
    async with db.transaction() as tx:
        await retrieve_within(tx, reach, workspace_id, lock=True)
        for kind, value in wanted.items():
            await set_override(tx, workspace_id, kind, value)
        await ring(tx, workspace_id)


async def overrides_of(db: Database, workspace_id: str) -> dict[RateKind, int]:
    """Return a workspace's overrides; for operators."""
    async with db.autocommit() as tx:
        return await _overrides(tx, workspace_id)


async def _overrides(tx: Tx, workspace_id: str) -> dict[RateKind, int]:
    statement = select(WorkspaceRateLimitRow.kind, WorkspaceRateLimitRow.requests_per_minute)
    rows = await tx.execute(statement.where(WorkspaceRateLimitRow.workspace_id == workspace_id))
    return {RateKind(kind): value for kind, value in rows}


def _group(kind: RateKind) -> dict[str, str]:
    return {
        "id": ids.derived_id(ids.RATE_LIMIT_GROUP, kind.value),
        "type": GROUP_TYPE,
        "display_name": DISPLAY_NAMES[kind],
    }


def _workspace_entry(organization_id: str, workspace_id: str, kind: RateKind, override: int | None, limit: int) -> dict[str, Any]:
    value = {
        "type": LIMITER,
        "value": limit if override is None else override,
        "org_limit": limit,
        "source": {"type": "organization" if override is None else "workspace"},
    }
    return {
        "type": "workspace_rate_limit",
        "rate_limit_id": rate_limit_id(organization_id, kind),
        "workspace_id": workspace_id,
        "group": _group(kind),
        "limits": [value],
        "models": [],
    }


def _page(
    listing: str, entries: list[dict[str, Any]], query: ListRateLimitsQuery | ListWorkspaceRateLimitsQuery
) -> dict[str, Any]:
    """Return a page; everything at once where no `limit` is given (spec: RateLimitListParams.limit)."""
    if query.group_type not in (None, GROUP_TYPE):
        entries = []
    begin = 0 if query.page is None else decode_cursor(listing, query.page, (int,))[0]
    if begin < 0:
        raise InvalidRequest("invalid page cursor")
    end = len(entries) if query.limit is None else begin + query.limit
    more = end < len(entries)
    return {"data": entries[begin:end], "next_page": encode_cursor(listing, [end]) if more else None}
