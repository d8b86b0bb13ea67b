"""What can go wrong with an embedded Postgres. Each message is one line with the remedy.

EmbeddedPostgresError
├── PostgresNotFound   no PostgreSQL programs of that version here
├── DataDirInUse       another process runs a server on the data directory
├── DataDirUnusable    the data directory cannot be used: rights, version, half of it missing
├── PortInUse          the port asked for is taken
└── StartFailed        initdb or postgres failed; the message ends with its last words
"""

from __future__ import annotations

from pathlib import Path


class EmbeddedPostgresError(Exception):
    """Base of the errors of an embedded Postgres."""


class PostgresNotFound(EmbeddedPostgresError):
    """There are no PostgreSQL programs of that version on this host."""


class DataDirInUse(EmbeddedPostgresError):
    """Another process runs a server on this data directory."""

    def __init__(self, data_dir: Path, pid: int | None) -> None:
        """``pid`` is the process that uses ``data_dir``; None: it cannot be told."""
        self.data_dir = data_dir
        self.pid = pid
        who = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"data directory {data_dir} is in use by {who}: stop it, or choose another directory")


class DataDirUnusable(EmbeddedPostgresError):
    """The data directory cannot be used; the message says why and what to do."""


class PortInUse(EmbeddedPostgresError):
    """The port asked for is taken."""

    def __init__(self, port: int) -> None:
        self.port = port
        super().__init__(f"port {port} on 127.0.0.1 is in use: choose another, or 0 for a free one")


class StartFailed(EmbeddedPostgresError):
    """``initdb`` or ``postgres`` failed; the message ends with its last words."""
