"""Draining an agent drains its sessions, whichever server does it.

Expand: a trigger on a column that only people change. A server of the release
before drains and undrains as ever, and its word holds for claims of the next one's
leader too. Locks: the agent, then its sessions, as a Hello does.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE FUNCTION drain_sessions() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            UPDATE session SET drained = NEW.drained WHERE agent_id = NEW.id;
            RETURN NULL;
        END
        $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER agent_drained AFTER UPDATE OF drained ON agent
        FOR EACH ROW WHEN (OLD.drained IS DISTINCT FROM NEW.drained)
        EXECUTE FUNCTION drain_sessions()
        """
    )
    op.execute("UPDATE session SET drained = true WHERE agent_id IN (SELECT id FROM agent WHERE drained)")


def downgrade() -> None:
    op.execute("DROP TRIGGER agent_drained ON agent")
    op.execute("DROP FUNCTION drain_sessions()")
