"""Repositories of sessions: their sealed tokens, and what became of them in each sandbox."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("session_resources", sa.Column("sealed_token", sa.LargeBinary(), nullable=True))
    op.add_column(
        "sandboxes", sa.Column("repositories", postgresql.JSONB(), nullable=False, server_default=sa.text("'{}'::jsonb"))
    )


def downgrade() -> None:
    op.drop_column("sandboxes", "repositories")
    op.drop_column("session_resources", "sealed_token")
