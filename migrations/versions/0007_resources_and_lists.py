"""A sandbox's row says which files were mounted into it, so that its owner can follow changes of the session's resources.

Lists: sessions are found by agent, events by thread and type, without reading the others; an event keeps where it waited.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

SESSIONS_BY_AGENT = "ix_sessions_workspace_id_agent_id_created_at_id"
EVENTS_BY_THREAD = "ix_events_session_id_thread_id_type_seq"
EVENTS_BY_TYPE = "ix_events_session_id_type_seq"


def upgrade() -> None:
    mounts = sa.Column("mounts", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False)
    op.add_column("sandboxes", mounts)
    op.add_column("events", sa.Column("inbox_seq", sa.BigInteger(), nullable=True))
    op.create_index(EVENTS_BY_THREAD, "events", ["session_id", "thread_id", "type", "seq"])
    op.drop_index(EVENTS_BY_TYPE, table_name="events")
    op.create_index(SESSIONS_BY_AGENT, "sessions", ["workspace_id", "agent_id", "created_at", "id"])


def downgrade() -> None:
    op.drop_index(SESSIONS_BY_AGENT, table_name="sessions")
    op.create_index(EVENTS_BY_TYPE, "events", ["session_id", "type", "seq"])
    op.drop_index(EVENTS_BY_THREAD, table_name="events")
    op.drop_column("events", "inbox_seq")
    op.drop_column("sandboxes", "mounts")
