"""Sessions know which of their calls wait for the client."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("waiting", sa.Text))


def downgrade() -> None:
    op.drop_column("sessions", "waiting")
