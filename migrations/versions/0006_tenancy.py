"""Workspaces that can be archived, keys that expire, environment keys, rate limits."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workspaces", sa.Column("is_default", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("workspaces", sa.Column("display_color", sa.Text(), server_default=sa.text("'#6C5BB9'"), nullable=False))
    op.add_column(
        "workspaces",
        sa.Column("tags", postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
    )
    op.add_column("workspaces", sa.Column("archived_at", sa.DateTime(timezone=True), nullable=True))
    op.execute(
        "UPDATE workspaces SET is_default = true WHERE id IN "
        "(SELECT DISTINCT ON (organization_id) id FROM workspaces ORDER BY organization_id, created_at, id)"
    )
    op.drop_constraint("uq_workspaces_organization_id_name", "workspaces", type_="unique")
    live = sa.text("archived_at IS NULL")
    op.create_index("uq_workspaces_live_name", "workspaces", ["organization_id", "name"], unique=True, postgresql_where=live)
    default = sa.text("is_default")
    op.create_index("uq_workspaces_default", "workspaces", ["organization_id"], unique=True, postgresql_where=default)

    op.add_column("api_keys", sa.Column("environment_id", sa.Text(), nullable=True))
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("inactive", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_foreign_key(
        op.f("fk_api_keys_environment_id"), "api_keys", "environments", ["environment_id"], ["id"], ondelete="CASCADE"
    )
    of_environments = sa.text("environment_id IS NOT NULL")
    op.create_index("ix_api_keys_environment_id", "api_keys", ["environment_id"], postgresql_where=of_environments)

    op.create_table(
        "workspace_rate_limits",
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("requests_per_minute", sa.Integer(), nullable=False),
        sa.CheckConstraint("kind in ('create', 'read')", name=op.f("ck_workspace_rate_limits_kind")),
        sa.CheckConstraint("requests_per_minute >= 0", name=op.f("ck_workspace_rate_limits_requests_per_minute")),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_workspace_rate_limits_workspace_id")),
        sa.PrimaryKeyConstraint("workspace_id", "kind", name=op.f("pk_workspace_rate_limits")),
    )
    op.create_table(
        "rate_budgets",
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("newest_slot", sa.BigInteger(), nullable=False),
        sa.Column("charges", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.PrimaryKeyConstraint("subject_id", "kind", name=op.f("pk_rate_budgets")),
    )


def downgrade() -> None:
    op.drop_table("rate_budgets")
    op.drop_table("workspace_rate_limits")
    op.execute("DELETE FROM api_keys WHERE environment_id IS NOT NULL")
    op.drop_index("ix_api_keys_environment_id", "api_keys")
    op.drop_constraint(op.f("fk_api_keys_environment_id"), "api_keys", type_="foreignkey")
    for column in ("inactive", "expires_at", "environment_id"):
        op.drop_column("api_keys", column)
    op.drop_index("uq_workspaces_default", "workspaces")
    op.drop_index("uq_workspaces_live_name", "workspaces")
    op.create_unique_constraint(op.f("uq_workspaces_organization_id_name"), "workspaces", ["organization_id", "name"])
    for column in ("archived_at", "tags", "display_color", "is_default"):
        op.drop_column("workspaces", column)
