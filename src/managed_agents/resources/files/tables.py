"""Files: metadata, and the reference that keeps a blob alive.

`session_id` is the scope. It carries no foreign key: sessions are a layer above, and they delete their
files themselves.
"""

from datetime import datetime

from sqlalchemy import BigInteger, Boolean, CheckConstraint, DateTime, ForeignKey, Index, Text, func
from sqlalchemy.orm import Mapped, mapped_column

from managed_agents.db.engine import Base


class FileRow(Base):
    __tablename__ = "files"
    __table_args__ = (
        CheckConstraint("size_bytes >= 0", name="size_bytes"),
        Index("ix_files_newest_first", "workspace_id", "created_at", "id"),
        Index("ix_files_session_newest_first", "session_id", "created_at", "id"),
        Index("uq_files_session_id_output_path", "session_id", "output_path", unique=True),
        Index("ix_files_sha256", "sha256"),  # the blob collector asks whether anybody refers to a blob
    )

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    workspace_id: Mapped[str] = mapped_column(Text, ForeignKey("workspaces.id"))
    filename: Mapped[str] = mapped_column(Text)
    mime_type: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(Text)
    downloadable: Mapped[bool] = mapped_column(Boolean)
    session_id: Mapped[str | None] = mapped_column(Text)
    # Where the session wrote it, below its outputs directory; a file written again takes the place of the
    # older one.
    output_path: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class DeletedOutputRow(Base):
    """An output that a client deleted: what is at its path in the sandbox is not to become a file again as it is."""

    __tablename__ = "deleted_outputs"

    session_id: Mapped[str] = mapped_column(Text, primary_key=True)
    output_path: Mapped[str] = mapped_column(Text, primary_key=True)
    sha256: Mapped[str] = mapped_column(Text)
