"""The journal: what survives, what is refused, what is shared."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.journal import Journal, JournalUnavailable
from lessor_agent.protocol.actions import DropEvents, DropLease, Entry, PutEvent, PutHandle, PutLease, PutPhase
from lessor_agent.runtimes.base import Handle
from tests.support.agent_core import a_grant
from tests.support.privileges import bound_by_modes

pytestmark = pytest.mark.unit

HANDLE = Handle("process", 3, {"lease_id": 1, "path": "/x"})


class Writer:
    """A journal whose transactions are waited for."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self._ticket = 0

    def write(self, *entries: Entry) -> str | None:
        """Commits entries; returns the error."""
        return self.write_all([entries])[0]

    def write_all(self, transactions: Sequence[Sequence[Entry]]) -> list[str | None]:
        """Commits several transactions; returns their errors in order."""
        results: list[str | None] = []
        tickets: list[int] = []
        settled = threading.Event()

        def done(ticket: int, error: str | None) -> None:
            tickets.append(ticket)
            results.append(error)
            if len(results) == len(transactions):
                settled.set()

        first = self._ticket + 1
        for entries in transactions:
            self._ticket += 1
            self.journal.submit(self._ticket, entries, done)
        assert settled.wait(10)
        assert tickets == list(range(first, self._ticket + 1))
        return results


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer(tmp_path / "journal.db")
    made.journal.open("boot-1")
    yield made
    made.journal.close()


def a_lease(lease_id: int) -> PutLease:
    grant = a_grant(lease_id)
    return PutLease(lease_id, grant.job_id, grant.SerializeToString())


def an_event(seq: int, lease_id: int) -> PutEvent:
    event = pb.LeaseEvent(seq=seq, lease_id=lease_id, accepted=pb.Accepted())
    return PutEvent(seq, lease_id, event.SerializeToString())


def test_a_new_journal_is_empty(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    contents = journal.open("boot-1")
    journal.close()
    assert (contents.boot_id, contents.leases, contents.events, contents.last_seq) == ("", (), (), 0)


def test_what_is_committed_is_there_without_a_close(writer: Writer, tmp_path: Path) -> None:
    assert writer.write(a_lease(1)) is None
    assert writer.write(PutHandle(1, HANDLE), PutPhase(1, LeasePhase.ACCEPTED), an_event(5, 1)) is None
    # As after a crash: the first journal is never closed.
    after = Journal(tmp_path / "journal.db")
    contents = after.open("boot-2")
    after.close()
    [lease] = contents.leases
    assert (lease.grant, lease.phase, lease.handle) == (a_grant(1), LeasePhase.ACCEPTED, HANDLE)
    assert [event.seq for event in contents.events] == [5]
    assert (contents.boot_id, contents.last_seq) == ("boot-1", 5)


def test_a_crash_between_intent_and_handle_leaves_the_intent(writer: Writer, tmp_path: Path) -> None:
    writer.write(a_lease(1))
    after = Journal(tmp_path / "journal.db")
    [lease] = after.open("boot-1").leases
    after.close()
    assert (lease.phase, lease.handle) == (LeasePhase.OFFERED, None)


def test_a_dropped_lease_leaves_a_tombstone(writer: Writer, tmp_path: Path) -> None:
    writer.write(a_lease(1), an_event(5, 1))
    writer.write(DropLease(1), DropEvents((5,)))
    after = Journal(tmp_path / "journal.db")
    contents = after.open("boot-1")
    after.close()
    assert (contents.leases, contents.events, contents.tombstones, contents.last_seq) == ((), (), (1,), 5)


def test_transactions_that_wait_together_are_settled_in_order(writer: Writer, tmp_path: Path) -> None:
    assert writer.write_all([[a_lease(lease_id)] for lease_id in range(1, 1500)]) == [None] * 1499
    with sqlite3.connect(tmp_path / "journal.db") as database:
        assert database.execute("SELECT count(*) FROM lease").fetchone() == (1499,)


def test_a_corrupt_file_is_refused_and_so_is_every_transaction(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"no database at all" * 500)
    writer = Writer(path)
    with pytest.raises(JournalUnavailable, match=r"journal\.db cannot be used"):
        writer.journal.open("boot-1")
    assert "cannot be used" in (writer.write(a_lease(1)) or "")
    writer.journal.close()
    assert path.read_bytes() == b"no database at all" * 500


def test_a_journal_of_a_newer_agent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    journal = Journal(path)
    with pytest.raises(JournalUnavailable, match="newer version"):
        journal.open("boot-1")
    journal.close()


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "missing" / "journal.db")
    with pytest.raises(JournalUnavailable):
        journal.open("boot-1")
    journal.close()


def test_a_full_journal_refuses_whole_transactions_and_recovers(writer: Writer, tmp_path: Path) -> None:
    writer.write(a_lease(1))
    # SQLite fails in the middle of the transaction, as on a full disk.
    blocker = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
    blocker.execute("CREATE TRIGGER full BEFORE INSERT ON event BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    assert "disk full" in (writer.write(a_lease(2), an_event(1, 2)) or "")
    blocker.execute("DROP TRIGGER full")
    assert writer.write(a_lease(3), an_event(2, 3)) is None
    rows = blocker.execute("SELECT lease_id FROM lease ORDER BY lease_id").fetchall()
    blocker.close()
    assert rows == [(1,), (3,)]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A disk that has no room for the first thing an agent writes, for as long as the list is not empty."""
    full = [True]
    make_ready = Journal._make_ready  # noqa: SLF001 - the step at which a full disk shows

    def without_room(self: Journal, database: sqlite3.Connection) -> None:
        if full and self._boot_id is not None:
            raise sqlite3.OperationalError("database or disk is full")
        make_ready(self, database)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_make_ready", without_room)
        yield full


def test_on_a_full_disk_what_it_holds_is_read_and_written_on_when_there_is_room(
    writer: Writer, tmp_path: Path, full_disk: list[bool]
) -> None:
    writer.write(a_lease(1), an_event(1, 1))
    later = Writer(tmp_path / "journal.db")
    contents = later.journal.open("boot-2")
    assert ([lease.grant.lease_id for lease in contents.leases], contents.boot_id) == ([1], "boot-1")
    assert "disk is full" in (later.write(a_lease(2)) or "")
    full_disk.clear()
    assert later.write(a_lease(3)) is None
    later.journal.close()
    last = Journal(tmp_path / "journal.db")
    contents = last.open("boot-2")
    last.close()
    assert [lease.grant.lease_id for lease in contents.leases] == [1, 3]
    assert contents.boot_id == "boot-2"


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("unable to open database file"),
        OSError(errno.EROFS, "unable to open: read-only file system"),
    ],
    ids=["no_room", "read_only_file_system"],
)
def test_a_closed_journal_is_read_where_nothing_can_be_made_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    first = Writer(tmp_path / "journal.db")
    first.journal.open("boot-1")
    first.write(a_lease(1))
    first.journal.close()
    connect = Journal._connect  # noqa: SLF001 - the step at which it shows

    def refused(self: Journal) -> sqlite3.Connection:
        raise error

    later = Writer(tmp_path / "journal.db")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_connect", refused)
        contents = later.journal.open("boot-1")
        assert [lease.grant.lease_id for lease in contents.leases] == [1]
        assert "unable to open" in (later.write(a_lease(2)) or "")
        patch.setattr(Journal, "_connect", connect)
        assert later.write(a_lease(3)) is None
    later.journal.close()


def test_a_new_journal_without_room_is_refused(tmp_path: Path, full_disk: list[bool]) -> None:
    writer = Writer(tmp_path / "journal.db")
    with pytest.raises(JournalUnavailable, match="disk is full"):
        writer.journal.open("boot-1")
    assert "disk is full" in (writer.write(a_lease(1)) or "")
    writer.journal.close()


def test_a_read_only_file_is_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal.db")
    first.open("boot-1")
    first.close()
    (tmp_path / "journal.db").chmod(0o400)
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(JournalUnavailable, match="Permission denied"):
        bound_by_modes(lambda: journal.open("boot-1"))
    journal.close()
    assert (tmp_path / "journal.db").stat().st_mode & 0o777 == 0o400, "it is left as it was made"


def test_old_and_many_tombstones_are_pruned(writer: Writer, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.db") as database:
        database.executemany(
            "INSERT INTO tombstone VALUES (?, strftime('%s', 'now'))", [(n,) for n in range(100, 10_200)]
        )
        database.execute("INSERT INTO tombstone VALUES (99999, 0)")
    after = Journal(tmp_path / "journal.db")
    tombstones = after.open("boot-1").tombstones
    after.close()
    assert len(tombstones) == 10_000
    assert (tombstones[0], tombstones[-1]) == (200, 10_199)


def test_the_files_are_the_owners_alone_also_when_they_were_not(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.touch(0o644)
    path.chmod(0o644)
    journal = Journal(path)
    journal.open("boot-1")
    try:
        assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.glob("journal.db*")} == dict.fromkeys(
            ("journal.db", "journal.db-wal", "journal.db-shm"), 0o600
        )
    finally:
        journal.close()
