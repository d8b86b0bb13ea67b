"""A PostgreSQL server of our own: made on first start, gone with the process that started it."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from lessor_server.embedded import guard
from lessor_server.embedded.binaries import (
    Account,
    Binaries,
    binaries_at,
    find_binaries,
    reachable_binaries,
    unprivileged_account,
)
from lessor_server.embedded.cluster import DATABASE, SUPERUSER, clean_environment, make_cluster
from lessor_server.embedded.data_dir import locked, make_data_dir, refuse_foreign_server
from lessor_server.embedded.errors import DataDirUnusable, EmbeddedPostgresError, PortInUse, StartFailed

_log = logging.getLogger(__name__)

_POLL_S = 0.01
_FREE_PORT_TRIES = 5
_STOP_STEP = timedelta(seconds=10)
"""A stop is fast for this long, then immediate for this long, then by force."""

_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedPostgres:
    """One PostgreSQL server on a data directory, listening on 127.0.0.1 only.

    It is a child of this process and ends with it, however it ends. Logins need
    a password that is made on first start and kept in the data directory, readable
    to its owner alone. Works as an ordinary user and as root (the server then runs
    as ``postgres`` or ``nobody``). Several may run at once on different directories.

    The directory holds ``pgdata`` (the cluster), ``password``, ``postgres.log``
    (of the last start), ``lock`` and, where it is needed, ``binaries``.

    :meth:`start` and :meth:`stop` block for up to seconds; in an event loop call
    them through ``asyncio.to_thread``. Not for use by two threads at once.
    """

    def __init__(
        self,
        data_dir: Path | None,
        *,
        port: int = 0,
        version: int | Path = 18,
        settings: Mapping[str, str] | None = None,
        durable: bool = True,
    ) -> None:
        """Describes a server; nothing happens before :meth:`start`.

        Args:
            data_dir: Kept between runs, made when it is missing. None: a temporary one that is gone
                when the server is.
            port: TCP port on 127.0.0.1. 0: a free one, another at every start.
            version: Major version to look for, or the directory of ``initdb`` and ``postgres``.
            settings: PostgreSQL settings, name → value; they win over ours.
            durable: False: committed data may be lost when the host (not the server) crashes; faster.
        """
        self._wanted_dir = data_dir
        self._wanted_port = port
        self._version = version
        self._settings = dict(settings or {})
        self._durable = durable
        self._data_dir: Path | None = None
        self._password = ""
        self._port = 0
        self._pid = 0
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Starts it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it."""
        self.stop()

    @property
    def database_url(self) -> str:
        """``postgresql://…`` of its database, password included. Valid until the next start."""
        return self.url(DATABASE)

    def url(self, database: str) -> str:
        """Returns ``postgresql://…`` of a database of this server, with its superuser.

        Raises:
            EmbeddedPostgresError: It was never started.
        """
        if not self._port:
            raise EmbeddedPostgresError("the embedded Postgres was not started")
        return f"postgresql://{SUPERUSER}:{self._password}@127.0.0.1:{self._port}/{database}"

    @property
    def data_dir(self) -> Path:
        """The data directory; of a temporary one, known from the start on."""
        directory = self._data_dir or self._wanted_dir
        if directory is None:
            raise EmbeddedPostgresError("the embedded Postgres was not started")
        return directory

    @property
    def port(self) -> int:
        """Its TCP port; 0: never started."""
        return self._port

    @property
    def pid(self) -> int:
        """Process id of the server; 0: not running."""
        return self._pid if self.running else 0

    @property
    def running(self) -> bool:
        """Whether it runs; False too when it died."""
        return self._guard is not None and self._guard.poll() is None

    def start(self, timeout: timedelta = timedelta(seconds=60)) -> None:
        """Starts it, making the cluster first if there is none. Returns when it takes connections.

        Raises:
            PostgresNotFound: No PostgreSQL of that version is here.
            DataDirInUse: Another process runs a server on the directory.
            DataDirUnusable: The directory cannot be written, reached or read by this version.
            PortInUse: The port asked for is taken.
            StartFailed: initdb or postgres failed, or took longer than ``timeout``.
        """
        if self.running:
            raise EmbeddedPostgresError("the embedded Postgres already runs")
        self.stop()
        deadline = time.monotonic() + timeout.total_seconds()
        account = unprivileged_account()
        binaries = binaries_at(self._version) if isinstance(self._version, Path) else find_binaries(self._version)
        directory = self._data_dir = make_data_dir(self._wanted_dir, account)
        try:
            with locked(directory) as lock:
                refuse_foreign_server(directory)
                if account is not None:
                    binaries = reachable_binaries(binaries, account, directory / "binaries")
                self._password = make_cluster(directory, binaries, account, self._durable)
                self._launch(directory, binaries, account, lock, deadline)
        except OSError as error:
            self.stop()
            raise DataDirUnusable(f"data directory {directory} cannot be used: {error}") from error
        except BaseException:
            self.stop()
            raise
        _log.info(
            "embedded Postgres started",
            extra={"event": "postgres_started", "pid": self._pid, "port": self._port, "data_dir": str(directory)},
        )

    def stop(self) -> None:
        """Stops it: sessions are ended, the data is consistent. Does nothing when it does not run."""
        process, self._guard, self._pid = self._guard, None, 0
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(3 * _STOP_STEP.total_seconds() + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._wanted_dir is None and self._data_dir is not None:
            # The guard removes it after a stop; here it is for a start that failed before there was one.
            shutil.rmtree(self._data_dir, ignore_errors=True)
            self._data_dir = None

    def _launch(
        self, directory: Path, binaries: Binaries, account: Account | None, lock: IO[str], deadline: float
    ) -> None:
        for attempt in range(_FREE_PORT_TRIES):
            self._port = self._wanted_port or _free_port()
            try:
                self._run(directory, binaries, account, lock, deadline)
            except PortInUse:
                # Between finding a port free and using it somebody else may take it.
                if self._wanted_port or attempt == _FREE_PORT_TRIES - 1:
                    raise
            else:
                return

    def _run(
        self, directory: Path, binaries: Binaries, account: Account | None, lock: IO[str], deadline: float
    ) -> None:
        log = directory / "postgres.log"
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
            "timezone": "UTC",
            "log_timezone": "UTC",
            **({} if self._durable else _NOT_DURABLE),
            **self._settings,
        }
        argv = [str(binaries.bin_dir / "postgres"), "-D", str(directory / "pgdata")]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        plan: dict[str, Any] = {
            "argv": argv,
            "log": str(log),
            "uid": account.uid if account else None,
            "gid": account.gid if account else None,
            "lock_fd": lock.fileno(),
            "remove": str(directory) if self._wanted_dir is None else None,
            "stop_s": _STOP_STEP.total_seconds(),
        }
        # A session of its own: Ctrl-C on the terminal reaches the owner, who decides the order of the end.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guard.__file__).resolve()), json.dumps(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[lock.fileno()],
            start_new_session=True,
            env=clean_environment(),
            cwd="/",
        )
        assert self._guard.stdout is not None
        with self._guard.stdout as told:
            self._pid = int(told.readline() or b"0")
        while not _is_ready(directory / "pgdata", self._pid):
            if self._guard.poll() is not None:
                words = _last_words(log)
                if "Address already in use" in words:
                    raise PortInUse(self._port)
                raise StartFailed(f"postgres did not start: {words} (whole log: {log})")
            if time.monotonic() > deadline:
                raise StartFailed(f"postgres did not take connections in time: {_last_words(log)} (whole log: {log})")
            time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(pgdata: Path, pid: int) -> bool:
    """Reads the status that the server keeps in its pid file, as pg_ctl does."""
    try:
        lines = (pgdata / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def _last_words(log: Path) -> str:
    """Returns the lines of a server log that say why it ended, as one line."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"no log: {error}"
    telling = [line for line in lines if "FATAL:" in line or "PANIC:" in line or "could not bind" in line]
    return " | ".join((telling or lines)[-3:]) or "it said nothing"
