"""What belongs to a session beside its log: mounted resources and the sandboxes bound to it."""

from datetime import datetime
from typing import Any, cast

from sqlalchemy import BigInteger, Boolean, DateTime, Double, ForeignKey, Identity, Index, Integer, LargeBinary, Table, Text, text
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
    # Of a repository: its token, bound to this row (`encryption/sealing.py`).
    sealed_token: Mapped[bytes | None] = mapped_column(LargeBinary)
    # The same for the same token of a workspace and URL; null without a token, and in rows of releases that had no cached clones.
    token_fingerprint: Mapped[str | None] = mapped_column(Text)
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
    # The environment's networking when the session was created: later changes of the environment do not reach it.
    networking: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=text('\'{"type": "unrestricted"}\''))
    egress_bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    # provisioning | live | stopping | paused | stopped | destroyed
    state: Mapped[str] = mapped_column(Text)
    # The environment's packages when the session was created. Only the release before reads them, which may run beside this one;
    # the column goes with the next.
    packages: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    # What became of the session's repositories in it, by resource: absent before they were cloned.
    repositories: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=text("'{}'"))
    # What the model is to be told of this sandbox, with the first outcome; null once that is in the log.
    note: Mapped[str | None] = mapped_column(Text)
    # When calls may last have run in it; null while it never was live.
    used_at: Mapped[datetime | None] = mapped_column(INSTANT)
    # When the state that it holds began: its own creation, or that of the sandbox whose snapshot was restored into it.
    since: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))
    created_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))
    last_used_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))

    __table_args__ = (
        Index("uq_sandboxes_session_id_generation", "session_id", "generation", unique=True),
        Index("ix_sandboxes_host", "host", postgresql_where=text("state <> 'destroyed'")),
    )


class EgressRow(Base):
    """A request or tunnel of a session's sandbox, as its gateway saw it. The newest thousand of a session are kept."""

    __tablename__ = "egress_log"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    session_id: Mapped[str] = mapped_column(Text)
    sandbox_id: Mapped[str] = mapped_column(Text)
    generation: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime] = mapped_column(INSTANT)
    protocol: Mapped[str] = mapped_column(Text)  # http | https | connect | socks
    host: Mapped[str] = mapped_column(Text)
    port: Mapped[int] = mapped_column(Integer)
    outcome: Mapped[str] = mapped_column(Text)
    bytes_sent: Mapped[int] = mapped_column(BigInteger)
    bytes_received: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float] = mapped_column(Double)

    __table_args__ = (Index("ix_egress_log_session_id_id", "session_id", "id"),)


class SandboxSnapshotRow(Base):
    """The newest snapshot of a session's sandbox: where a sandbox made after a loss begins."""

    __tablename__ = "sandbox_snapshots"

    session_id: Mapped[str] = mapped_column(Text, primary_key=True)
    generation: Mapped[int] = mapped_column(Integer)
    sha256: Mapped[str] = mapped_column(Text, index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    since: Mapped[datetime] = mapped_column(INSTANT)
    taken_at: Mapped[datetime] = mapped_column(INSTANT)  # when it was begun


class SandboxWaitRow(Base):
    """A session whose sandbox waits for a place on its host. One that stopped renewing `seen_at` has gone."""

    __tablename__ = "sandbox_waits"

    session_id: Mapped[str] = mapped_column(Text, primary_key=True)
    workspace_id: Mapped[str] = mapped_column(Text)
    host: Mapped[str] = mapped_column(Text, index=True)
    since: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))
    seen_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))


class RepositoryCloneRow(Base):
    """A cached clone: a git bundle of a repository as its host sent it to a session with this very token."""

    __tablename__ = "repository_clones"

    workspace_id: Mapped[str] = mapped_column(Text, primary_key=True)
    url: Mapped[str] = mapped_column(Text, primary_key=True)
    token_fingerprint: Mapped[str] = mapped_column(Text, primary_key=True)  # empty: cloned without a token
    sha256: Mapped[str] = mapped_column(Text, index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))
    used_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))


class PooledSandboxRow(Base):
    """A sandbox made ahead, nobody's yet. Adopting it takes the row away."""

    __tablename__ = "pooled_sandboxes"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    host: Mapped[str] = mapped_column(Text, index=True)
    environment_id: Mapped[str] = mapped_column(Text)
    fingerprint: Mapped[str] = mapped_column(Text)  # of what it was made like: see `SandboxSpec.fingerprint`
    ready: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(INSTANT, server_default=text("clock_timestamp()"))


RESOURCES = cast(Table, SessionResourceRow.__table__)
