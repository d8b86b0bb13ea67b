"""Reading and watching output files."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import inotify_simple
import pytest

from lessor.v1 import job_pb2
from lessor_agent import logs
from lessor_agent.logs import OutputReader, OutputWatcher
from lessor_agent.runtimes.base import OutputFiles
from lessor_agent.workload_events import EventReader

pytestmark = pytest.mark.unit

STDOUT = job_pb2.LOG_STREAM_STDOUT


@pytest.fixture
def files(tmp_path: Path) -> OutputFiles:
    made = OutputFiles(tmp_path / "stdout", tmp_path / "stderr", tmp_path / "events")
    for path in (made.stdout, made.stderr, made.events):
        path.touch()
    return made


@pytest.fixture
def reader(files: OutputFiles) -> Iterator[OutputReader]:
    made = OutputReader(files)
    yield made
    made.close()


def test_a_look_tells_sizes_and_only_new_events(files: OutputFiles, reader: OutputReader) -> None:
    files.stdout.write_bytes(b"abc")
    files.events.write_bytes(b"one\n")
    look = reader.look()
    assert (look.stdout_bytes, look.stderr_bytes, look.events, look.more_events) == (3, 0, b"one\n", False)
    with open(files.events, "ab") as file:
        file.write(b"two\n")
    assert reader.look().events == b"two\n"
    assert reader.look().events == b""


def test_a_long_events_file_is_read_in_pieces(files: OutputFiles, reader: OutputReader) -> None:
    files.events.write_bytes(b"x" * (logs.MAX_EVENT_READ_BYTES + 1))
    first, second = reader.look(), reader.look()
    assert (first.more_events, second.more_events, second.events) == (True, False, b"x")


def test_bytes_taken_away_read_as_nul(files: OutputFiles, reader: OutputReader) -> None:
    files.stdout.write_bytes(b"abcdef")
    assert reader.read(STDOUT, 2, 3) == b"cde"
    files.stdout.write_bytes(b"abc")
    assert reader.read(STDOUT, 2, 3) == b"c\0\0"


def test_missing_files_are_empty(tmp_path: Path) -> None:
    reader = OutputReader(OutputFiles(tmp_path / "a", tmp_path / "b", tmp_path / "c"))
    look = reader.look()
    assert (look.stdout_bytes, look.stderr_bytes, look.events) == (0, 0, b"")


def test_a_closed_reader_invents_nothing(files: OutputFiles, reader: OutputReader) -> None:
    reader.close()
    assert reader.read(STDOUT, 0, 10) == b""


@pytest.mark.parametrize("fault", ["none", "no_instance", "no_watch"])
async def test_a_change_is_noticed_with_or_without_inotify(
    fault: str, files: OutputFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError(28, "no space left on device")

    if fault == "no_instance":
        monkeypatch.setattr(inotify_simple, "INotify", fail)
    elif fault == "no_watch":
        monkeypatch.setattr(inotify_simple.INotify, "add_watch", fail)
    watcher = OutputWatcher()
    changed = asyncio.Event()
    unwatch = watcher.watch([files.stdout, files.stderr], changed.set)
    files.stderr.write_bytes(b"x")
    await asyncio.wait_for(changed.wait(), 5)
    unwatch()
    watcher.close()


async def test_an_ended_watch_is_silent(files: OutputFiles) -> None:
    watcher = OutputWatcher()
    silent, heard = asyncio.Event(), asyncio.Event()
    watcher.watch([files.stdout], silent.set)()
    watcher.watch([files.stderr], heard.set)
    files.stdout.write_bytes(b"x")
    files.stderr.write_bytes(b"x")
    await asyncio.wait_for(heard.wait(), 5)
    assert not silent.is_set()
    watcher.close()


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_file_is_empty_and_said_once(
    kind: str, files: OutputFiles, reader: OutputReader, caplog: pytest.LogCaptureFixture
) -> None:
    files.stdout.unlink()
    if kind == "directory":
        files.stdout.mkdir()
    else:
        os.mkfifo(files.stdout)
    files.stderr.write_bytes(b"err")
    for _ in range(2):
        look = reader.look(final=True)
        assert (look.stdout_bytes, look.stderr_bytes, look.short) == (0, 3, False)
    # What the server asks for all the same can be completed.
    assert reader.read(STDOUT, 0, 2) == b"\0\0"
    assert len(caplog.records) == 1


def test_a_file_that_cannot_be_read_any_more_ends_where_it_was_seen(
    files: OutputFiles, reader: OutputReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.stdout.write_bytes(b"abcdef")
    assert reader.look().stdout_bytes == 6

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert reader.read(STDOUT, 2, 4) == b"\0\0\0\0"
    monkeypatch.undo()
    files.stdout.write_bytes(b"abcdefgh")
    look = reader.look(final=True)
    assert (look.stdout_bytes, look.short) == (6, False)


def test_without_descriptors_it_is_tried_again(
    files: OutputFiles, reader: OutputReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.stdout.write_bytes(b"abc")

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        assert reader.look().short
        assert reader.read(STDOUT, 0, 3) == b""
    assert (reader.look().short, reader.look().stdout_bytes) == (False, 3)
    assert reader.read(STDOUT, 0, 3) == b"abc"


def test_of_a_flood_of_events_the_end_is_read(files: OutputFiles, reader: OutputReader) -> None:
    line = b'{"type": "progress", "fraction": 0.25}\n'
    flood = line * (3 * logs.MAX_FINAL_EVENT_BYTES // len(line))
    files.events.write_bytes(flood + b'{"type": "result", "value": 7}\n')
    events = EventReader(1)
    taken = 0
    more = True
    while more:
        look = reader.look(final=True)
        # Whoever still writes there holds up nothing.
        with open(files.events, "ab") as file:
            file.write(line * 3000)
        if look.events_skipped:
            events.skip()
        events.feed(look.events)
        taken += len(look.events)
        more = look.more_events
    assert logs.MAX_FINAL_EVENT_BYTES <= taken <= logs.MAX_FINAL_EVENT_BYTES + 1
    assert events.result_json == b"7"
