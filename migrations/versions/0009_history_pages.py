"""Pages of histories: events are found by thread and type, and an event that waited keeps where it waited."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

BY_THREAD = "ix_events_session_id_thread_id_type_seq"
BY_TYPE = "ix_events_session_id_type_seq"


def upgrade() -> None:
    op.add_column("events", sa.Column("inbox_seq", sa.BigInteger(), nullable=True))
    op.create_index(BY_THREAD, "events", ["session_id", "thread_id", "type", "seq"])
    op.drop_index(BY_TYPE, table_name="events")


def downgrade() -> None:
    op.create_index(BY_TYPE, "events", ["session_id", "type", "seq"])
    op.drop_index(BY_THREAD, table_name="events")
    op.drop_column("events", "inbox_seq")
