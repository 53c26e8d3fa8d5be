"""Snapshots of sandboxes, the hosts they belong to, and what a sandbox has of its environment."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("packages", postgresql.JSONB(), nullable=True))
    op.add_column("sandboxes", sa.Column("note", sa.Text(), nullable=True))
    op.add_column("sandboxes", sa.Column("used_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("sandboxes", sa.Column("since", sa.DateTime(timezone=True), nullable=False, server_default=NOW))
    op.execute("UPDATE sandboxes SET used_at = last_used_at, since = created_at")
    op.create_table(
        "sandbox_snapshots",
        sa.Column("session_id", sa.Text(), primary_key=True),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_sandbox_snapshots_sha256", "sandbox_snapshots", ["sha256"])
    op.create_table(
        "hosts",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("alive_until", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("hosts")
    op.drop_table("sandbox_snapshots")
    for column in ("since", "used_at", "note", "packages"):
        op.drop_column("sandboxes", column)
