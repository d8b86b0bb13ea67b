"""The agent's journal: what it must still know after a crash, in SQLite.

One thread owns the database. Transactions that are submitted while one commits
share the next: one fsync for all of them (group commit). A journal that cannot
be written refuses each transaction, and the agent then takes no new work; it
goes on with what it has, and each later transaction tries again. So does one
that could be read, but not written, when the agent came: on a full disk, say.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.protocol.actions import (
    DropEvents,
    DropLease,
    Entry,
    PutEvent,
    PutHandle,
    PutLease,
    PutPhase,
)
from lessor_agent.runtimes.base import Handle

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MAX_TOMBSTONES = 10_000
MAX_TOMBSTONE_AGE_S = 7 * 24 * 3600
MAX_GROUP = 512
"""At most this many transactions share one commit."""

_OWNER_ONLY = 0o600

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lease (
    lease_id INTEGER PRIMARY KEY,
    job_id   TEXT NOT NULL,
    "grant"  BLOB NOT NULL,
    phase    INTEGER NOT NULL,
    handle   TEXT
);
CREATE TABLE IF NOT EXISTS event (seq INTEGER PRIMARY KEY, lease_id INTEGER NOT NULL, event BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS tombstone (lease_id INTEGER PRIMARY KEY, made_at INTEGER NOT NULL);
"""


class JournalUnavailable(Exception):
    """The journal cannot be read or written; the message says why."""


@dataclass(frozen=True, slots=True)
class JournalledLease:
    """A lease as the journal has it."""

    grant: pb.Grant
    phase: LeasePhase
    handle: Handle | None
    """None: only the intent was journalled."""


@dataclass(frozen=True, slots=True)
class Contents:
    """All that a journal holds."""

    boot_id: str = ""
    """Boot of the host in which it was last opened; empty: it is new."""
    leases: tuple[JournalledLease, ...] = ()
    events: tuple[pb.LeaseEvent, ...] = ()
    tombstones: tuple[int, ...] = ()
    last_seq: int = 0


Done = Callable[[int, str | None], None]
"""Called from the journal's thread with a ticket and None, or why it failed."""


class Journal:
    """The journal in ``<state_dir>/journal.db``."""

    def __init__(self, path: Path) -> None:
        """Makes a journal over the file ``path``; :meth:`open` reads it."""
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._boot_id: str | None = None
        """To be noted before anything else is written; None: it is."""
        self._error: str | None = "the journal is not open"
        self._queue: queue.SimpleQueue[tuple[int, Sequence[Entry], Done] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._reported: str | None = None

    def open(self, boot_id: str) -> Contents:
        """Opens the file, making it if it is missing, notes ``boot_id`` and returns what it held.

        What it held is returned although it cannot be written, as long as it can be
        read: jobs that run are not given up for want of room.

        Raises:
            JournalUnavailable: It is corrupt, of a newer version, or new and
                cannot be made. The journal then refuses every transaction.
        """
        try:
            contents = self._open(boot_id)
        except (sqlite3.Error, OSError, ValueError) as error:
            self._error = f"the journal {self._path} cannot be used: {error}"
            self._drop()
            raise JournalUnavailable(self._error) from error
        else:
            self._error = None
            return contents
        finally:
            self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()

    def _open(self, boot_id: str) -> Contents:
        self._boot_id = boot_id
        try:
            self._database = self._connect()
        except PermissionError:
            raise
        except (sqlite3.OperationalError, OSError) as error:
            contents = self._read_as_it_lies()
            if contents is None:
                raise
            self._report(f"the journal {self._path} cannot be opened: {error}")
            return contents
        last_boot_id = self._read_boot_id(self._database)
        try:
            self._make_ready(self._database)
        except sqlite3.Error as error:
            if last_boot_id is None:
                raise
            self._report(f"the journal {self._path} cannot be written: {error}")
        return self._read(self._database, last_boot_id or "")

    def _read_as_it_lies(self) -> Contents | None:
        """Returns what it holds, read without the files that SQLite wants to make beside it; None: nobody can tell."""
        wal = Path(f"{self._path}-wal")
        if not self._path.exists() or (wal.exists() and wal.stat().st_size):
            return None
        with contextlib.closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            last_boot_id = self._read_boot_id(database)
            return None if last_boot_id is None else self._read(database, last_boot_id)

    def _drop(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def submit(self, ticket: int, entries: Sequence[Entry], done: Done) -> None:
        """Has ``entries`` committed in one transaction, after all that were submitted before. Never blocks."""
        self._queue.put((ticket, entries, done))

    def close(self) -> None:
        """Commits what was submitted and closes the file."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._drop()

    # ── the thread ───────────────────────────────────────────────────────────

    def _run(self) -> None:
        closing = False
        while not closing:
            group = []
            item = self._queue.get()
            while item is not None:
                group.append(item)
                if len(group) >= MAX_GROUP:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            closing = item is None
            if not group:
                continue
            error = self._commit([entry for _, entries, _ in group for entry in entries])
            for ticket, _, done in group:
                done(ticket, error)

    def _commit(self, entries: Sequence[Entry]) -> str | None:
        if self._error is not None:
            return self._error
        try:
            if self._database is None:
                self._database = self._connect()
            self._make_ready(self._database)
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                for entry in entries:
                    self._write(self._database, entry)
                last_seq = max((entry.seq for entry in entries if isinstance(entry, PutEvent)), default=0)
                if last_seq:
                    self._set_meta(self._database, "last_seq", str(last_seq))
        except (sqlite3.Error, OSError) as failure:
            if self._database is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._database.rollback()
            return self._report(f"the journal {self._path} cannot be written: {failure}")
        if self._reported is not None:
            log.info("journal available again", extra={"event": "journal_recovered"})
            self._reported = None
        return None

    def _report(self, error: str) -> str:
        """Says once why nothing can be written; returns it."""
        if error != self._reported:
            log.error("journal unavailable: no new work is taken", extra={"event": "journal_failed", "error": error})
        self._reported = error
        return error

    def _write(self, database: sqlite3.Connection, entry: Entry) -> None:
        match entry:
            case PutLease():
                database.execute(
                    'INSERT OR REPLACE INTO lease (lease_id, job_id, "grant", phase) VALUES (?, ?, ?, ?)',
                    (entry.lease_id, entry.job_id, entry.grant, int(LeasePhase.OFFERED)),
                )
            case PutHandle():
                database.execute(
                    "UPDATE lease SET handle = ? WHERE lease_id = ?", (_encode_handle(entry.handle), entry.lease_id)
                )
            case PutPhase():
                database.execute("UPDATE lease SET phase = ? WHERE lease_id = ?", (int(entry.phase), entry.lease_id))
            case PutEvent():
                database.execute(
                    "INSERT OR REPLACE INTO event (seq, lease_id, event) VALUES (?, ?, ?)",
                    (entry.seq, entry.lease_id, entry.event),
                )
            case DropEvents():
                database.executemany("DELETE FROM event WHERE seq = ?", [(seq,) for seq in entry.seqs])
            case DropLease():
                database.execute("DELETE FROM lease WHERE lease_id = ?", (entry.lease_id,))
                database.execute(
                    "INSERT OR REPLACE INTO tombstone (lease_id, made_at) VALUES (?, ?)",
                    (entry.lease_id, int(time.time())),
                )

    # ── opening ──────────────────────────────────────────────────────────────

    def _connect(self) -> sqlite3.Connection:
        # Commands and their variables are in it. What SQLite puts beside the file takes over its mode.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _OWNER_ONLY))
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.chmod(f"{self._path}{suffix}", _OWNER_ONLY)
        database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            check = database.execute("PRAGMA quick_check(1)").fetchone()
            if check is None or check[0] != "ok":
                raise sqlite3.DatabaseError(f"integrity check: {check[0] if check else 'no answer'}")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise sqlite3.DatabaseError(
                    "it was written by a newer version of the agent "
                    f"(schema {version}, this one knows {SCHEMA_VERSION})"
                )
        except BaseException:
            database.close()
            raise
        return database

    def _make_ready(self, database: sqlite3.Connection) -> None:
        """Does what is to be written once, before anything else is."""
        if self._boot_id is None:
            return
        database.executescript(_SCHEMA)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._prune(database)
        self._set_meta(database, "boot_id", self._boot_id)
        self._boot_id = None

    def _prune(self, database: sqlite3.Connection) -> None:
        database.execute("DELETE FROM tombstone WHERE made_at < ?", (int(time.time()) - MAX_TOMBSTONE_AGE_S,))
        database.execute(
            "DELETE FROM tombstone WHERE lease_id NOT IN "
            "(SELECT lease_id FROM tombstone ORDER BY lease_id DESC LIMIT ?)",
            (MAX_TOMBSTONES,),
        )

    def _read_boot_id(self, database: sqlite3.Connection) -> str | None:
        """Returns the boot that is noted in it; None: it is new."""
        if not _rows(database, "SELECT 1 FROM sqlite_master WHERE name = 'tombstone'"):
            return None
        noted = _rows(database, "SELECT value FROM meta WHERE key = 'boot_id'")
        return str(noted[0][0]) if noted else ""

    def _read(self, database: sqlite3.Connection, last_boot_id: str) -> Contents:
        """Returns what it holds."""
        leases = tuple(
            JournalledLease(
                pb.Grant.FromString(grant), LeasePhase(phase), None if handle is None else _decode_handle(handle)
            )
            for grant, phase, handle in _rows(database, 'SELECT "grant", phase, handle FROM lease ORDER BY lease_id')
        )
        events = tuple(
            pb.LeaseEvent.FromString(event) for (event,) in _rows(database, "SELECT event FROM event ORDER BY seq")
        )
        tombstones = tuple(
            lease_id for (lease_id,) in _rows(database, "SELECT lease_id FROM tombstone ORDER BY lease_id")
        )
        noted = _rows(database, "SELECT value FROM meta WHERE key = 'last_seq'")
        last_seq = max([int(noted[0][0]) if noted else 0, *(event.seq for event in events)])
        return Contents(last_boot_id, leases, events, tombstones, last_seq)

    def _set_meta(self, database: sqlite3.Connection, key: str, value: str) -> None:
        database.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))


def _rows(database: sqlite3.Connection, sql: str) -> list[tuple[Any, ...]]:
    return database.execute(sql).fetchall()


def _encode_handle(handle: Handle) -> str:
    return json.dumps({"runtime": handle.runtime, "version": handle.version, "data": dict(handle.data)})


def _decode_handle(text: str) -> Handle:
    value = json.loads(text)
    return Handle(runtime=value["runtime"], version=value["version"], data=value["data"])
