"""What belongs to a session beside its log: mounted resources and the sandboxes bound to it."""

from datetime import datetime
from typing import Any, cast

from sqlalchemy import DateTime, ForeignKey, Index, Integer, Table, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from managed_agents.db.engine import Base

INSTANT = DateTime(timezone=True)


class SessionResourceRow(Base):
    """A mounted resource. `body` is what clients see, less id and instants."""

    __tablename__ = "session_resources"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    session_id: Mapped[str] = mapped_column(Text, ForeignKey("sessions.id"))
    type: Mapped[str] = mapped_column(Text)
    # Absolute path inside the sandbox; `body.mount_path` is the caller's own string.
    sandbox_path: Mapped[str] = mapped_column(Text)
    file_id: Mapped[str | None] = mapped_column(Text)
    body: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(INSTANT)
    updated_at: Mapped[datetime] = mapped_column(INSTANT)

    __table_args__ = (Index("uq_session_resources_session_id_sandbox_path", "session_id", "sandbox_path", unique=True),)


class SandboxRow(Base):
    """A sandbox bound to a session. Written as `provisioning` before anything exists, so that nothing can leak unseen.

    No call is ever sent to a sandbox that is not `live`.
    """

    __tablename__ = "sandboxes"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    session_id: Mapped[str] = mapped_column(Text)
    generation: Mapped[int] = mapped_column(Integer)
    host: Mapped[str] = mapped_column(Text)
    # What was mounted into it: path → SHA-256. Its owner compares this with the session's resources.
    mounts: Mapped[dict[str, str]] = mapped_column(JSONB, server_default=text("'{}'"))
    state: Mapped[str] = mapped_column(Text)  # provisioning | live | destroyed
    created_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))
    last_used_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))

    __table_args__ = (
        Index("uq_sandboxes_session_id_generation", "session_id", "generation", unique=True),
        Index("ix_sandboxes_host", "host", postgresql_where=text("state <> 'destroyed'")),
    )


RESOURCES = cast(Table, SessionResourceRow.__table__)
