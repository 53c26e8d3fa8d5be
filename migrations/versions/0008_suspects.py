"""Sessions that may have killed their workers are found at once."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_sessions_suspects", "sessions", ["id"], postgresql_where=sa.text("owner IS NOT NULL AND crashes >= 2"))


def downgrade() -> None:
    op.drop_index("ix_sessions_suspects", "sessions")
