"""The leader row says how long lease time has stood still in a storm.

Expand: one column with a constant default. A server of the release before neither
reads nor writes it.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE leader ADD COLUMN stood_ms bigint NOT NULL DEFAULT 0")


def downgrade() -> None:
    op.execute("ALTER TABLE leader DROP COLUMN stood_ms")
