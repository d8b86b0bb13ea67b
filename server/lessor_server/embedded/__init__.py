"""Embedded Postgres: a private PostgreSQL server as a child of this process.

For ``lessor dev``, the demo and the tests. A deployment brings its own database.
"""

from lessor_server.embedded.binaries import Binaries, find_binaries
from lessor_server.embedded.data_dir import default_data_dir
from lessor_server.embedded.errors import (
    DataDirInUse,
    DataDirUnusable,
    EmbeddedPostgresError,
    PortInUse,
    PostgresNotFound,
    StartFailed,
)
from lessor_server.embedded.postgres import EmbeddedPostgres

__all__ = [
    "Binaries",
    "DataDirInUse",
    "DataDirUnusable",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "PortInUse",
    "PostgresNotFound",
    "StartFailed",
    "default_data_dir",
    "find_binaries",
]
