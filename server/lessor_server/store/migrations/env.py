"""Runs migrations on the connection that ``lessor_server.store.migrate`` hands over."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import Connection, text


def on_applied(*_: Any, **told: Any) -> None:
    """Notes, in the transaction of a contract step, which servers the schema serves from now on."""
    script: Any = told["step"].up_revision
    serves_from = getattr(script.module, "serves_from", None)
    if serves_from is not None:
        connection.execute(text("UPDATE schema_floor SET revision = :revision"), {"revision": serves_from})


connection: Connection = context.config.attributes["connection"]
# One transaction each: the locks of one are gone before the next asks for others.
context.configure(connection=connection, transaction_per_migration=True, on_version_apply=on_applied)
with context.begin_transaction():
    context.run_migrations()
