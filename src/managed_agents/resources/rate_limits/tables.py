"""What workspaces may use of their organisation's rate limits, and what has been handed out of each budget lately."""

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Integer, Text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from managed_agents.db.engine import Base


class WorkspaceRateLimitRow(Base):
    """An override. The organisation's limit holds beside it."""

    __tablename__ = "workspace_rate_limits"
    __table_args__ = (
        CheckConstraint("kind in ('create', 'read')", name="kind"),
        CheckConstraint("requests_per_minute >= 0", name="requests_per_minute"),
    )

    workspace_id: Mapped[str] = mapped_column(Text, ForeignKey("workspaces.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(Text, primary_key=True)
    requests_per_minute: Mapped[int] = mapped_column(Integer)


class RateBudgetRow(Base):
    """One budget: `charges[i]` requests may still be made, or were made, until the end of slot `newest_slot - i`.

    Locked while a block is taken out (`window.py` is the arithmetic). It has no foreign key: a budget of something that
    is gone is a row nobody looks at.
    """

    __tablename__ = "rate_budgets"

    subject_id: Mapped[str] = mapped_column(Text, primary_key=True)  # an organisation or a workspace
    kind: Mapped[str] = mapped_column(Text, primary_key=True)
    newest_slot: Mapped[int] = mapped_column(BigInteger)
    charges: Mapped[list[int]] = mapped_column(ARRAY(Integer))
