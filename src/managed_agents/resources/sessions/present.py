"""Rows as the API shows them. Shapes: beta_managed_agents_session.py, beta_managed_agents_session_thread.py."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from managed_agents.core.clock import millis
from managed_agents.eventlog import fold
from managed_agents.eventlog.append import session_state_of, thread_state_of

Json = dict[str, Any]


def _optional(instant: datetime | None) -> str | None:
    return None if instant is None else millis(instant)


def session_json(row: Any, resources: Sequence[Any], at: datetime) -> Json:
    """A session as of the database's instant `at` (running time is counted up to it)."""
    state = session_state_of(row)
    ended = row.terminated_at or at
    return {
        "type": "session",
        "id": row.id,
        "status": state.status,
        "title": row.title,
        "agent": row.agent,
        "environment_id": row.environment_id,
        "vault_ids": [],
        "deployment_id": None,
        "resources": [resource_json(resource) for resource in resources],
        "metadata": row.metadata,
        "budget": fold.budget_json(row.budget_cents),
        "usage": fold.usage_json(state.totals, state.active.until(at), measured=state.requests > 0, runtime=True),
        "stats": {
            "active_seconds": round(state.threads_active_until(at), 6),
            "duration_seconds": round(max(0.0, (ended - row.created_at).total_seconds()), 6),
        },
        "outcome_evaluations": [],
        "created_at": millis(row.created_at),
        "updated_at": millis(row.updated_at),
        "archived_at": _optional(row.archived_at),
    }


def resource_json(row: Any) -> Json:
    """A mounted resource."""
    return {
        "id": row.id,
        "type": row.type,
        **row.body,
        "created_at": millis(row.created_at),
        "updated_at": millis(row.updated_at),
    }


def thread_json(row: Any, at: datetime) -> Json:
    """A thread. `stats` is null before the first status transition, `usage` before the first idle."""
    state = thread_state_of(row)
    # A terminated thread's row is not written again.
    ended = row.updated_at if state.status == "terminated" else at
    active = state.active.until(at)
    stats: Json | None = None
    if state.started_at is not None:
        startup = 0.0
        if row.parent_thread_id is None:
            startup = max(0.0, (state.started_at - row.created_at).total_seconds())
        stats = {
            "active_seconds": round(active, 6),
            "duration_seconds": round(max(0.0, (ended - row.created_at).total_seconds()), 6),
            "startup_seconds": round(startup, 6),
        }
    return {
        "type": "session_thread",
        "id": row.id,
        "session_id": row.session_id,
        "agent": row.agent,
        "parent_thread_id": row.parent_thread_id,
        "status": state.status,
        "stats": stats,
        "usage": fold.usage_json(state.totals, active, measured=True, runtime=False) if state.idled else None,
        "workflow_run_id": None,
        "created_at": millis(row.created_at),
        "updated_at": millis(row.updated_at),
        "archived_at": _optional(row.archived_at),
    }
