"""What a session's budget leaves for model requests beside the turn's own: judging calls, searching with the model.

The turn's own requests are refused by the append that would begin them (`within_budget`). These have no span of their own, so
they look here first. What is not in the log yet has to be taken off by who knows of it.
"""

from decimal import Decimal

from sqlalchemy import text

from managed_agents.db.engine import Tx
from managed_agents.eventlog import fold
from managed_agents.eventlog.fold import Active, Totals

_SPENT = text(
    "SELECT budget_cents, token_cost, active_seconds, running_since, clock_timestamp() AS now FROM sessions WHERE id = :id"
)


async def left(tx: Tx, session_id: str) -> Decimal | None:
    """US dollars that may still be spent; nothing or less when the budget is used up, null when there is none."""
    row = (await tx.execute(_SPENT, {"id": session_id})).one_or_none()
    if row is None or row.budget_cents is None:
        return None
    dollars = fold.spent(Totals(token_cost=row.token_cost), Active(row.active_seconds, row.running_since).until(row.now))
    return Decimal(0) if dollars is None else Decimal(row.budget_cents) / 100 - dollars
