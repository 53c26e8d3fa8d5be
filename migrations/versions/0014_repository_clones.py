"""Cached clones of repositories, and what tells their tokens apart."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    op.add_column("session_resources", sa.Column("token_fingerprint", sa.Text(), nullable=True))
    op.create_table(
        "repository_clones",
        sa.Column("workspace_id", sa.Text(), primary_key=True),
        sa.Column("url", sa.Text(), primary_key=True),
        sa.Column("token_fingerprint", sa.Text(), primary_key=True),
        sa.Column("sha256", sa.Text(), nullable=False, index=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
    )


def downgrade() -> None:
    op.drop_table("repository_clones")
    op.drop_column("session_resources", "token_fingerprint")
