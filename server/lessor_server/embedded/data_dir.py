"""The data directory of an embedded server: making it, and letting one process at a time use it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lessor_server.embedded.binaries import Account, can_reach
from lessor_server.embedded.errors import DataDirInUse, DataDirUnusable

_POLL_S = 0.01
_LEAVING_S = 30.0
"""How long to wait for a server that is about to end."""


def default_data_dir() -> Path:
    """Returns where a lasting embedded server keeps its data when nobody says otherwise.

    Root's home is closed to the user that runs PostgreSQL for root, so root gets
    ``/var/lib/lessor/postgres``; others ``$XDG_DATA_HOME/lessor/postgres``.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/lessor/postgres")
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "lessor" / "postgres"


def make_data_dir(wanted: Path | None, account: Account | None) -> Path:
    """Makes the directory, which ``account`` must be able to pass through. Never opens what is not ours."""
    mode = 0o700 if account is None else 0o711
    if wanted is None:
        directory = Path(tempfile.mkdtemp(prefix="lessor-postgres-"))
        directory.chmod(mode)
    else:
        directory = wanted.resolve()
        try:
            ours = (directory / "lock").exists()
            missing = [path for path in (directory, *directory.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir()
                # Whatever the umask: what we make ourselves must let the other user through.
                path.chmod(mode if path == directory or account is None else 0o755)
                ours = True
            if ours and account is not None:
                directory.chmod(directory.stat().st_mode | 0o011)
        except OSError as error:
            raise DataDirUnusable(
                f"data directory {directory} cannot be made: {error.strerror}; choose one that you can write to"
            ) from error
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise DataDirUnusable(f"data directory {directory} cannot be written; choose one that you can write to")
    if account is not None and not can_reach(directory / "pgdata", account):
        if wanted is None:
            shutil.rmtree(directory, ignore_errors=True)
        raise DataDirUnusable(
            f"data directory {directory} is out of reach for user {account.name}, who runs PostgreSQL for root; "
            f"choose one such as {default_data_dir()}, or start lessor as an ordinary user"
        )
    return directory


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[IO[str]]:
    """Holds the lock of a data directory; the guard inherits it and holds it as long as it lives.

    A server whose owner is gone is about to end: for that one we wait.
    """
    with (directory / "lock").open("a+") as lock:
        (directory / "lock").chmod(0o600)
        deadline = time.monotonic() + _LEAVING_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                record = _parse_record(lock.read())
                owner = record.get("owner")
                leaving = record.get("stopping") or (owner is not None and _is_over(owner))
                if not leaving or time.monotonic() > deadline:
                    raise DataDirInUse(directory, owner) from None
            time.sleep(_POLL_S)
        lock.seek(0)
        lock.truncate()
        lock.write(json.dumps({"owner": os.getpid()}))
        lock.flush()
        yield lock


def _parse_record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _is_over(pid: int) -> bool:
    """Whether a process has ended, a zombie included."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def refuse_foreign_server(directory: Path) -> None:
    """Refuses a cluster that a server runs on which we did not start, such as one by ``pg_ctl``."""
    pgdata = directory / "pgdata"
    try:
        pid = int((pgdata / "postmaster.pid").read_text().split("\n", 1)[0])
        # A postmaster stands in its data directory: this tells it from a stranger with a used-again pid.
        if Path(f"/proc/{pid}/cwd").resolve(strict=True) == pgdata.resolve():
            raise DataDirInUse(directory, pid)
    except (OSError, ValueError):
        return
