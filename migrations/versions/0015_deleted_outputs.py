"""Outputs that clients deleted, so that the next look at the sandbox does not make them again."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "deleted_outputs",
        sa.Column("session_id", sa.Text(), primary_key=True),
        sa.Column("output_path", sa.Text(), primary_key=True),
        sa.Column("sha256", sa.Text(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("deleted_outputs")
