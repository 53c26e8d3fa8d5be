"""Budgets: the most a session may cost, in list prices.

A budget is given when the session is created, may be replaced by one above what was spent, and removed for good. It is enforced
where a model request begins (`eventlog/batch.py`, as the session is written, on the exact cost), so what is spent beyond it
is at most one request.
"""

from sqlalchemy import text

from managed_agents.core.errors import InvalidRequest
from managed_agents.db.engine import Tx
from managed_agents.eventlog import fold
from managed_agents.eventlog.append import Head
from managed_agents.model.prices import priced
from managed_agents.resources.sessions.schemas import Budget

AT_CAP = frozenset({"user.tool_confirmation", "user.tool_result", "user.custom_tool_result", "user.interrupt"})
"""What a session accepts whose budget is used up: nothing that would begin a model request."""

_LAST_IDLE = text(
    "SELECT convert_from(body, 'UTF8')::json->'stop_reason'->>'type' FROM events "
    "WHERE session_id = :session_id AND type = 'session.thread_status_idle' AND thread_id = :thread_id "
    "ORDER BY seq DESC LIMIT 1"
)


def checked(budget: Budget | None, model: str) -> int | None:
    """The budget of a new session in cents.

    Raises InvalidRequest: the model has no list price.
    """
    if budget is None:
        return None
    if not priced(model):
        raise _not_budgetable(model)
    return budget.cents


def change(head: Head, budget: Budget | None) -> bool:
    """Set the budget of the locked session; says whether that changed anything.

    Raises InvalidRequest: there is none to replace, it is not above what was spent, or what was spent is not known.
    """
    if budget is None:
        removed = head.budget_cents is not None
        head.budget_cents = None
        return removed
    if head.budget_cents is None:
        raise InvalidRequest(
            "budget: can only be set when the session is created (budget_create_only)", error_code="budget_create_only"
        )
    if (dollars := fold.spent(head.state.totals, head.state.active.until(head.at))) is None:
        raise _not_budgetable("one that this session has used")
    if budget.cents <= dollars * 100:
        raise InvalidRequest(
            "budget.max_list_cost must be greater than the session's consumed list cost", error_code="budget_not_raised"
        )
    changed = head.budget_cents != budget.cents
    head.budget_cents = budget.cents
    return changed


async def resumes(tx: Tx, head: Head) -> bool:
    """Whether the locked session was stopped by its budget in the midst of a turn, and goes on with the one it has now."""
    if head.state.status != "idle" or head.owner is not None or head.at_cap:
        return False
    values = {"session_id": head.id, "thread_id": head.primary_thread_id}
    return (await tx.execute(_LAST_IDLE, values)).scalar_one_or_none() == "budget_reached"


def check_accepted(event_type: str, index: int) -> None:
    """Refuse what a session does not accept whose budget is used up. Raises InvalidRequest."""
    if event_type not in AT_CAP:
        raise InvalidRequest(
            f"Invalid `{event_type}` event at `events[{index}]`: the session has reached its budget; only "
            "`user.tool_confirmation`, `user.tool_result`, `user.custom_tool_result`, or `user.interrupt` may be sent",
        )


def _not_budgetable(model: str) -> InvalidRequest:
    return InvalidRequest(
        f"budget: the model {model} has no list price (model_not_budgetable)", error_code="model_not_budgetable"
    )
