"""API keys and environment keys: only an HMAC of each secret is kept.

Both are in one table, so that a request's key is found by one lookup, whichever kind it is. What tells them apart is
`environment_id`.
"""

from datetime import datetime

from sqlalchemy import Boolean, CheckConstraint, DateTime, ForeignKey, Index, LargeBinary, Text, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from managed_agents.db.engine import Base


class ApiKeyRow(Base):
    __tablename__ = "api_keys"
    __table_args__ = (
        UniqueConstraint("secret_hmac"),
        CheckConstraint("scope in ('viewer', 'developer', 'admin')", name="scope"),
        Index("ix_api_keys_environment_id", "environment_id", postgresql_where=text("environment_id IS NOT NULL")),
    )

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    workspace_id: Mapped[str] = mapped_column(Text, ForeignKey("workspaces.id"), index=True)
    # Set: an environment key, of no use for anything but this environment's sessions. It goes with its environment.
    environment_id: Mapped[str | None] = mapped_column(Text, ForeignKey("environments.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(Text)
    scope: Mapped[str] = mapped_column(Text)
    secret_hmac: Mapped[bytes] = mapped_column(LargeBinary)
    hint: Mapped[str] = mapped_column(Text)  # the secret's last characters, so that people can tell keys apart
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    last_used_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))  # coarse: once a minute
    expires_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    inactive: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))  # switched off, may be switched on again
    revoked_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))  # `archived` to clients: for ever
