"""Answers kept for callers that send an `Idempotency-Key`."""

from datetime import datetime

from sqlalchemy import DateTime, Index, LargeBinary, SmallInteger, Text, func
from sqlalchemy.orm import Mapped, mapped_column

from managed_agents.db.engine import Base


class IdempotencyKeyRow(Base):
    """One request that was worked on. The row commits with the work, so it exists exactly if the work was done."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_created_at", "created_at"),)

    workspace_id: Mapped[str] = mapped_column(Text, primary_key=True)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary)
    status: Mapped[int | None] = mapped_column(SmallInteger)
    media_type: Mapped[str | None] = mapped_column(Text)
    # Null where the answer holds a secret that is shown once: it is not kept anywhere.
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.clock_timestamp())
