"""The parts of a keeper: record, directory, tree, title, and what its processes import."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from lessor_agent.boottime import boot_id, boottime_ns
from lessor_agent.keeper import tree, zygote
from lessor_agent.keeper.directory import LeaseDirectory, LockTaken, Outcome, make_lease_directory
from lessor_agent.keeper.kernel import keeper_title, parse_keeper_title
from lessor_agent.keeper.record import EXPIRED, DeadlineRecord
from lessor_agent.keeper.tree import Process, all_processes, below, children_of, offspring, read_process, send

BOOT = "01234567-89ab-cdef-0123-456789abcdef"
OTHER_BOOT = "11234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def directory(tmp_path: Path) -> LeaseDirectory:
    return make_lease_directory(str(tmp_path / "7"), 7)


def outcome(**changes: object) -> Outcome:
    base = Outcome(7, 0, 0, None, None, 1, 2)
    return base._replace(**changes)  # type: ignore[arg-type]


def test_clock_and_boot_id() -> None:
    first = boottime_ns()
    assert 0 < first <= boottime_ns()
    assert len(boot_id()) == 36


# -- record ------------------------------------------------------------------------


def test_record_is_shared_and_only_moves_forward(directory: LeaseDirectory) -> None:
    directory.make_record(BOOT, 1000)
    agent = directory.map_record(BOOT)
    keeper = directory.map_record(BOOT)
    assert keeper.deadline_ns() == 1000
    agent.renew(2**62)
    assert keeper.deadline_ns() == 2**62
    agent.renew(1)
    assert keeper.deadline_ns() == 2**62
    agent.close()
    agent.close()
    assert keeper.deadline_ns() == 2**62
    keeper.close()


def test_deadline_is_one_aligned_word(directory: LeaseDirectory) -> None:
    directory.make_record(BOOT, 0x1122334455667788)
    raw = Path(directory.path, "record").read_bytes()
    offset = raw.index((0x1122334455667788).to_bytes(8, sys.byteorder))
    assert offset % 8 == 0


@pytest.mark.parametrize("change", ["magic", "boot", "lease", "zeros"])
def test_record_not_to_be_trusted_is_expired(directory: LeaseDirectory, change: str) -> None:
    directory.make_record(BOOT, 1000)
    fd = directory.open_file("record", os.O_RDWR)
    record = DeadlineRecord(fd, 8 if change == "lease" else 7, OTHER_BOOT if change == "boot" else BOOT)
    if change == "magic":
        os.pwrite(fd, b"X", 0)
    elif change == "zeros":
        os.pwrite(fd, bytes(64), 0)
    assert record.deadline_ns() == EXPIRED
    record.close()
    os.close(fd)


def test_record_cut_short_cannot_be_mapped(directory: LeaseDirectory) -> None:
    Path(directory.path, "record").write_bytes(b"short")
    with pytest.raises(ValueError, match="cut short"):
        directory.map_record(BOOT)


def test_making_a_record_twice_keeps_the_one_a_keeper_looks_at(directory: LeaseDirectory) -> None:
    directory.make_record(BOOT, 1000)
    keeper = directory.map_record(BOOT)
    directory.make_record(BOOT, 5000)
    assert keeper.deadline_ns() == 5000
    keeper.close()


def test_record_of_an_earlier_boot_is_replaced(directory: LeaseDirectory) -> None:
    directory.make_record(OTHER_BOOT, 9000)
    directory.make_record(BOOT, 1000)
    record = directory.map_record(BOOT)
    assert record.deadline_ns() == 1000
    record.close()


# -- directory -----------------------------------------------------------------------


def test_lock_is_exclusive_and_goes_with_its_holder(directory: LeaseDirectory) -> None:
    other = LeaseDirectory(directory.path, 7)
    assert not other.locked()
    directory.lock()
    assert other.locked()
    with pytest.raises(LockTaken, match="lease 7 has a keeper"):
        other.lock()
    directory.close()
    assert not other.locked()
    other.lock()
    other.close()


def test_outcome_is_whole_or_absent(directory: LeaseDirectory) -> None:
    assert directory.read_outcome() is None
    directory.reserve_outcome()
    assert directory.read_outcome() is None
    written = outcome(exit_code=None, signal=9, stop_cause="cancelled", start_error="é" * 5000)
    directory.write_outcome(written)
    read = directory.read_outcome()
    assert read is not None
    assert read.start_error is not None
    assert read._replace(start_error=None) == written._replace(start_error=None)
    assert read.start_error.startswith("é" * 1000)
    assert os.listdir(directory.path) == ["record"]
    directory.write_outcome(outcome(exit_code=1))
    assert directory.read_outcome() == outcome(exit_code=1)


def test_a_torn_or_damaged_outcome_is_none(directory: LeaseDirectory) -> None:
    directory.write_outcome(outcome(exit_code=None, start_error="é" * 1000))
    path = Path(directory.path, "record")
    whole = path.read_bytes()
    # What a crash leaves of a write: its first pages, or its last ones.
    for torn in (whole[:8192] + bytes(len(whole) - 8192), whole[:4100]):
        path.write_bytes(torn)
        with pytest.raises(ValueError, match="damaged"):
            directory.read_outcome()
    path.write_bytes(whole[:4096] + bytes(4096) + whole[8192:])
    assert directory.read_outcome() is None
    path.write_bytes(whole)
    assert directory.read_outcome() is not None


def test_an_outcome_of_another_kind_is_an_error(directory: LeaseDirectory) -> None:
    text = b'{"version": 1}'
    header = struct.pack("=II", len(text), zlib.crc32(text))
    Path(directory.path, "record").write_bytes(bytes(4096) + header + text)
    with pytest.raises(ValueError, match="not an outcome"):
        directory.read_outcome()


def test_an_outcome_and_a_record_do_not_disturb_each_other(directory: LeaseDirectory) -> None:
    directory.make_record(BOOT, 1000)
    record = directory.map_record(BOOT)
    directory.reserve_outcome()
    record.note_begun(34)
    directory.write_outcome(outcome(exit_code=5))
    record.renew(2000)
    directory.make_record(OTHER_BOOT, 3000)
    assert directory.read_outcome() == outcome(exit_code=5)
    assert directory.read_begun() == 34
    record.close()


def test_begun(directory: LeaseDirectory) -> None:
    assert directory.read_begun() is None
    directory.make_record(BOOT, 1000)
    record = directory.map_record(BOOT)
    assert directory.read_begun() is None
    record.note_begun(34)
    record.renew(2000)
    assert directory.read_begun() == 34
    assert record.deadline_ns() == 2000
    record.close()


@pytest.mark.parametrize("damage", [b"X", b"LESSORKR" + bytes(40)])
def test_what_began_stays_so_when_its_record_is_made_anew(directory: LeaseDirectory, damage: bytes) -> None:
    directory.make_record(OTHER_BOOT, 9000)
    record = directory.map_record(OTHER_BOOT)
    record.note_begun(34)
    record.close()
    fd = directory.open_file("record", os.O_RDWR)
    os.pwrite(fd, damage, 0)
    os.close(fd)
    directory.make_record(BOOT, 1000)
    anew = directory.map_record(BOOT)
    assert anew.deadline_ns() == 1000
    assert directory.read_begun() == 34
    anew.close()


def test_a_lock_is_held_whatever_becomes_of_the_record(directory: LeaseDirectory) -> None:
    directory.make_record(BOOT, 1000)
    directory.lock()
    fd = directory.open_file("record", os.O_RDWR)
    os.ftruncate(fd, 0)
    os.close(fd)
    other = LeaseDirectory(directory.path, 7)
    other.make_record(BOOT, 2000)
    assert other.locked()
    with pytest.raises(LockTaken):
        other.lock()
    other.close()


def test_deleted(directory: LeaseDirectory) -> None:
    assert not directory.deleted
    os.rmdir(directory.path)
    assert directory.deleted
    with pytest.raises(FileNotFoundError):
        directory.write_outcome(outcome())


# -- tree and title --------------------------------------------------------------------


def test_below_follows_parents_and_leaves_others() -> None:
    table = {
        pid: Process(pid, parent, pid, 1, "S", pid)
        for pid, parent in ((2, 1), (3, 2), (4, 3), (5, 1), (6, 4), (7, 2), (8, 5))
    }
    found = below(table, [2])
    assert sorted(p.pid for p in found) == [3, 4, 6, 7]
    assert [p.pid for p in found].index(3) < [p.pid for p in found].index(4)
    assert below(table, [6]) == []


def test_all_of_many_children_are_found() -> None:
    # More than one page of /proc lists. They end with the pipe, when nobody can write into it any more.
    script = "exec 3<&0; for n in $(seq 1500); do read line <&3 & done; echo up; wait"
    shell = subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert shell.stdout is not None
        assert shell.stdout.readline() == b"up\n"
        assert len(children_of(shell.pid)) == len(list(offspring(shell.pid))) == 1500
    finally:
        shell.communicate()


def test_own_process_is_found_and_a_later_one_of_its_pid_is_spared() -> None:
    own = read_process(os.getpid())
    assert own is not None
    assert own.alive
    assert all_processes()[os.getpid()].start_ticks == own.start_ticks
    assert own.parent == os.getppid()
    assert not send(own._replace(start_ticks=own.start_ticks - 1), 9)
    assert send(own, 0)


def test_a_dead_child_is_not_alive_and_not_signalled() -> None:
    child = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    dead = read_process(child.pid)
    assert dead is not None
    assert not dead.alive
    assert not send(dead, 0)
    child.wait()
    assert read_process(child.pid) is None


_HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=[1000]).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_has_exited_lives_until_the_last_one_has() -> None:
    with subprocess.Popen([sys.executable, "-c", _HEADLESS], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        while (process := read_process(child.pid)) is None or process.thread == child.pid:
            pass
        assert process.alive
        assert process.pid == child.pid
        assert os.path.isdir(f"/proc/{child.pid}/task/{process.thread}")
        assert send(process, signal.SIGSTOP)
        while (stopped := read_process(child.pid)) is None or stopped.state != tree.STOPPED:
            pass
        assert tree.freeze_and_kill(lambda: [process]) == 1
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        dead = read_process(child.pid)
        assert dead is not None
        assert not dead.alive


def test_children_are_killed_before_their_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = {5: 1, 4: 5, 9: 4, 3: 9, 6: 5, 20: 21, 21: 20}
    processes = [Process(pid, parent, 5, 1, "S", pid) for pid, parent in parents.items()]
    killed: list[int] = []

    def note(process: Process, signum: int) -> bool:
        if signum == signal.SIGKILL:
            killed.append(process.pid)
        return True

    monkeypatch.setattr(tree, "send", note)
    assert tree.freeze_and_kill(lambda: processes) == len(parents)
    assert sorted(killed) == sorted(parents)
    for pid, parent in parents.items():
        # Two that each say that the other is its parent come in any order.
        assert parent not in parents or pid >= 20 or killed.index(pid) < killed.index(parent)


@pytest.mark.parametrize("state_dir", ["/var/lib/lessor", "/with space/é\udcff", "/" + "d" * 300])
def test_title_is_read_back(state_dir: str) -> None:
    title = keeper_title(123, state_dir)
    assert parse_keeper_title(title + bytes(40)) == (123, state_dir)


@pytest.mark.parametrize(
    "cmdline",
    [
        b"",
        b"/bin/sh\0-c\0lessor-keeper --lease 1 --state-dir /x\0",
        b"lessor-keeper\0--lease\0x\0--state-dir\0/x\0",
        b"lessor-keeper\0--lease\x001\0",
    ],
)
def test_other_command_lines_are_no_title(cmdline: bytes) -> None:
    assert parse_keeper_title(cmdline) is None


# -- imports -----------------------------------------------------------------------------


def test_zygote_imports_nothing_that_a_fork_would_break() -> None:
    root = Path(zygote.__file__).parents[2]
    script = (
        f"import sys; sys.path.append({str(root)!r}); import lessor_agent.keeper.zygote, json;"
        "print(json.dumps(sorted(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in json.loads(result.stdout)}
    assert not modules & {
        "grpc",
        "asyncio",
        "google",
        "threading",
        "logging",
        "concurrent",
        "multiprocessing",
        "subprocess",
    }


# -- processes out of reach ------------------------------------------------------------------


def test_a_process_that_may_not_be_signalled_is_reported_once_and_ends_nobody(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    process = read_process(os.getpid())
    assert process is not None
    assert not send(process, 0)
    assert tree.freeze_and_kill(lambda: [process]) == 0
    assert capfd.readouterr().err.count(f"not permitted to signal process {os.getpid()}") == 1
