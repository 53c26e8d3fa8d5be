"""What a sandbox may reach, as its environment said when it was bound, and what it asked for."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "sandboxes",
        sa.Column(
            "networking",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text('\'{"type": "unrestricted"}\''),
            nullable=False,
        ),
    )
    op.add_column("sandboxes", sa.Column("egress_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.create_table(
        "egress_log",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("sandbox_id", sa.Text(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("protocol", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("bytes_sent", sa.BigInteger(), nullable=False),
        sa.Column("bytes_received", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_egress_log")),
    )
    op.create_index("ix_egress_log_session_id_id", "egress_log", ["session_id", "id"])


def downgrade() -> None:
    op.drop_table("egress_log")
    op.drop_column("sandboxes", "egress_bytes")
    op.drop_column("sandboxes", "networking")
