"""A sandbox's row says which files were mounted into it, so that its owner can follow changes of the session's resources.

Sessions are found by agent without reading those of other agents.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "sandboxes",
        sa.Column("mounts", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
    )
    op.create_index(
        "ix_sessions_workspace_id_agent_id_created_at_id", "sessions", ["workspace_id", "agent_id", "created_at", "id"]
    )


def downgrade() -> None:
    op.drop_index("ix_sessions_workspace_id_agent_id_created_at_id", table_name="sessions")
    op.drop_column("sandboxes", "mounts")
