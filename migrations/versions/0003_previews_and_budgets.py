"""Previews: who wants them. Budgets: what a session may cost."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "preview_interests",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_preview_interests")),
        prefixes=["UNLOGGED"],
    )
    op.add_column("sessions", sa.Column("budget_cents", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("sessions", "budget_cents")
    op.drop_table("preview_interests")
