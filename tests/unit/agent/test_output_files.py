"""Reading and watching output files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import inotify_simple
import pytest

from lessor.v1 import job_pb2
from lessor_agent import logs
from lessor_agent.logs import OutputReader, OutputWatcher
from lessor_agent.runtimes.base import OutputFiles

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
