"""Tables of the log: the session row is its head, `events` its body, `inbox` what waits to be taken up.

Invariants kept here and by triggers (migrations): rows of `events` are never changed, and are deleted only by the session
eraser under a transaction-local setting; `seq` of a session has no gaps because it is given under the session row's lock.
Lock order: session row, then threads, then inbox and events.
"""

from datetime import datetime
from decimal import Decimal
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from managed_agents.db.engine import Base

INSTANT = DateTime(timezone=True)


class TotalsMixin:
    """Sums over model requests, folded from `span.model_request_end`."""

    input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    output_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cache_read_input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cache_5m_input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cache_1h_input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    web_searches: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # US dollars, exact, searches included; null once a model without a list price was used.
    token_cost: Mapped[Decimal | None] = mapped_column(Numeric, server_default="0")
    active_seconds: Mapped[float] = mapped_column(Double, server_default="0")
    running_since: Mapped[datetime | None] = mapped_column(INSTANT)


class SessionRow(TotalsMixin, Base):
    """A session: what the client set, the head of its log, the work hint, the lease and the folded state."""

    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    workspace_id: Mapped[str] = mapped_column(Text, ForeignKey("workspaces.id"))
    # Null in a tombstone only, so that a deleted session does not keep its environment from being deleted.
    environment_id: Mapped[str | None] = mapped_column(Text, ForeignKey("environments.id"))
    agent_id: Mapped[str] = mapped_column(Text)
    agent_version: Mapped[int] = mapped_column(Integer)
    # json, not jsonb: the order of an input schema's properties is part of what the model reads.
    agent: Mapped[dict[str, Any]] = mapped_column(JSON)
    environment_config: Mapped[dict[str, Any]] = mapped_column(JSONB)
    # The most the session may cost, in US cents; null: no limit, and none can be set any more.
    budget_cents: Mapped[int | None] = mapped_column(BigInteger)
    primary_thread_id: Mapped[str] = mapped_column(Text)
    title: Mapped[str | None] = mapped_column(Text)
    # `metadata` is SQLAlchemy's own attribute, hence the other Python name.
    labels: Mapped[dict[str, str]] = mapped_column("metadata", JSONB, server_default=text("'{}'"))
    created_at: Mapped[datetime] = mapped_column(INSTANT)
    updated_at: Mapped[datetime] = mapped_column(INSTANT)
    archived_at: Mapped[datetime | None] = mapped_column(INSTANT)
    # A tombstone: 404 from then on; the eraser removes the rows in chunks.
    deleted_at: Mapped[datetime | None] = mapped_column(INSTANT)

    last_seq: Mapped[int] = mapped_column(BigInteger, server_default="0")
    last_processed_at: Mapped[datetime | None] = mapped_column(INSTANT)
    last_inbox_seq: Mapped[int] = mapped_column(BigInteger, server_default="0")
    inbox_count: Mapped[int] = mapped_column(Integer, server_default="0")

    # Work: `input_seq` rises with every API-side write the harness must see, `handled_seq` follows at its resting step.
    input_seq: Mapped[int] = mapped_column(BigInteger, server_default="0")
    handled_seq: Mapped[int] = mapped_column(BigInteger, server_default="0")
    due_at: Mapped[datetime | None] = mapped_column(INSTANT)
    not_before: Mapped[datetime | None] = mapped_column(INSTANT)
    crashes: Mapped[int] = mapped_column(Integer, server_default="0")
    epoch: Mapped[int] = mapped_column(BigInteger, server_default="0")
    owner: Mapped[str | None] = mapped_column(Text)

    status: Mapped[str] = mapped_column(Text, server_default="idle")
    threads_running: Mapped[int] = mapped_column(Integer, server_default="0")
    threads_active_seconds: Mapped[float] = mapped_column(Double, server_default="0")
    threads_since: Mapped[datetime | None] = mapped_column(INSTANT)
    requests: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # Calls that wait for the client, a JSON object in the order of the log: event id → type of the answer. Null when none does.
    waiting: Mapped[str | None] = mapped_column(Text)
    terminated_at: Mapped[datetime | None] = mapped_column(INSTANT)

    __table_args__ = (
        Index("ix_sessions_workspace_id_created_at_id", "workspace_id", "created_at", "id"),
        Index("ix_sessions_workspace_id_agent_id_created_at_id", "workspace_id", "agent_id", "created_at", "id"),
        Index("ix_sessions_environment_id", "environment_id"),
        Index(
            "ix_sessions_claimable",
            "id",
            postgresql_where=text("owner IS NULL AND deleted_at IS NULL AND (input_seq > handled_seq OR due_at IS NOT NULL)"),
        ),
        Index("ix_sessions_owner", "owner", postgresql_where=text("owner IS NOT NULL")),
        Index("ix_sessions_suspects", "id", postgresql_where=text("crashes >= 2")),
        Index("ix_sessions_deleted_at", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
        {"postgresql_with": {"fillfactor": "80"}},
    )


class ThreadRow(TotalsMixin, Base):
    """A session thread. Every session has one primary thread (no parent)."""

    __tablename__ = "session_threads"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    session_id: Mapped[str] = mapped_column(Text, ForeignKey("sessions.id"))
    workspace_id: Mapped[str] = mapped_column(Text)
    parent_thread_id: Mapped[str | None] = mapped_column(Text)
    agent: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(INSTANT)
    updated_at: Mapped[datetime] = mapped_column(INSTANT)
    archived_at: Mapped[datetime | None] = mapped_column(INSTANT)

    status: Mapped[str] = mapped_column(Text, server_default="idle")
    started_at: Mapped[datetime | None] = mapped_column(INSTANT)
    idled: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))

    __table_args__ = (
        Index("ix_session_threads_session_id_created_at_id", "session_id", "created_at", "id"),
        {"postgresql_with": {"fillfactor": "80"}},
    )


class EventRow(Base):
    """One event. `body` is the exact JSON that clients get; bytea, because jsonb refuses the NUL that tools print."""

    __tablename__ = "events"

    session_id: Mapped[str] = mapped_column(Text, primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(Text)
    thread_id: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(Text)
    processed_at: Mapped[datetime] = mapped_column(INSTANT)
    # Where it waited, for what did: a page of a history that has shown it there does not show it again.
    inbox_seq: Mapped[int | None] = mapped_column(BigInteger)
    # Tool results: the event id of the tool use they answer.
    tool_use_id: Mapped[str | None] = mapped_column(Text)
    # Flushed events are history but never sent to the model.
    for_model: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    body: Mapped[bytes] = mapped_column(LargeBinary)
    # What clients may not see but the next request, the bill or the folds need.
    private: Mapped[bytes | None] = mapped_column(LargeBinary)

    __table_args__ = (Index("ix_events_session_id_thread_id_type_seq", "session_id", "thread_id", "type", "seq"),)


class InboxRow(Base):
    """An accepted client event that waits to be taken up; then it moves to `events` under the same id."""

    __tablename__ = "inbox"

    session_id: Mapped[str] = mapped_column(Text, primary_key=True)
    inbox_seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(Text)
    thread_id: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(Text)
    # JSON object without `processed_at`.
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))


class WorkerRow(Base):
    """A living worker process. It heartbeats this row and holds advisory lock `lock_key` on the same connection."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    # Given by the database, so two workers can never share one.
    lock_key: Mapped[int] = mapped_column(BigInteger, Identity(always=True), unique=True)
    host: Mapped[str] = mapped_column(Text)
    pid: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))
    heartbeat_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))


class HostRow(Base):
    """A host with sandboxes, which its workers keep alive. Until it is silent for long, its sessions are left to it."""

    __tablename__ = "hosts"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    alive_until: Mapped[datetime] = mapped_column(INSTANT)


class PreviewInterestRow(Base):
    """A session with opted-in streams somewhere. Not logged by Postgres: what a crash forgets is registered again."""

    __tablename__ = "preview_interests"

    session_id: Mapped[str] = mapped_column(Text, primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(INSTANT)

    __table_args__ = ({"prefixes": ["UNLOGGED"]},)


SESSIONS = cast(Table, SessionRow.__table__)
THREADS = cast(Table, ThreadRow.__table__)
