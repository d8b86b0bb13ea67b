"""A session says whether its agent is drained, so that a claim can look under the lock it takes anyway.

Expand: one column with a constant default. A server of the release before neither
reads nor writes it; its planner leaves drained agents out as before.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE session ADD COLUMN drained boolean NOT NULL DEFAULT false")


def downgrade() -> None:
    op.execute("ALTER TABLE session DROP COLUMN drained")
