"""The database says which servers its schema still serves.

A server that meets a schema newer than its own cannot know whether that only added
to it. So the migration that takes something away notes here the oldest schema whose
servers still work (``serves_from``). Expand: one table. A server of the release
before neither reads nor writes it.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE TABLE schema_floor (one boolean PRIMARY KEY DEFAULT true CHECK (one), revision text NOT NULL)")
    op.execute("INSERT INTO schema_floor (revision) VALUES ('0001')")


def downgrade() -> None:
    op.execute("DROP TABLE schema_floor")
