"""What executions write: noticed through inotify, read off the event loop's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import inotify_simple

from lessor.v1 import job_pb2
from lessor_agent.runtimes.base import OutputFiles

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.1
"""How often files are looked at where inotify cannot be had."""

MAX_EVENT_READ_BYTES = 256 * 1024
"""Bytes of an events file taken per look, so that one chatty job cannot hold up the others."""


class OutputWatcher:
    """Calls back when a watched file has grown.

    One inotify instance for all files; where the kernel has no watch left, the
    files concerned are polled instead.
    """

    def __init__(self) -> None:
        """Begins on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._inotify: inotify_simple.INotify | None = None
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._polled: dict[object, Callable[[], None]] = {}
        self._poll_timer: asyncio.TimerHandle | None = None
        try:
            self._inotify = inotify_simple.INotify(nonblocking=True)
        except OSError as error:
            log.warning("no inotify; output files are polled", extra={"event": "inotify", "error": str(error)})
        else:
            self._loop.add_reader(self._inotify.fileno(), self._notified)

    def watch(self, paths: Iterable[Path], callback: Callable[[], None]) -> Callable[[], None]:
        """Calls ``callback`` after every change of a file; returns what ends the watch."""
        watches: list[int] = []
        try:
            if self._inotify is None:
                raise OSError("no inotify")
            for path in paths:
                watch = self._inotify.add_watch(path, inotify_simple.flags.MODIFY)
                watches.append(watch)
                self._callbacks[watch] = callback
        except OSError as error:
            self._remove(watches)
            watches = []
            log.debug("output files are polled", extra={"event": "inotify", "error": str(error)})
            key = object()
            self._polled[key] = callback
            if self._poll_timer is None:
                self._poll_timer = self._loop.call_later(POLL_INTERVAL_S, self._poll)
            return lambda: self._unpoll(key)
        return lambda: self._remove(watches)

    def close(self) -> None:
        """Ends every watch."""
        if self._poll_timer is not None:
            self._poll_timer.cancel()
            self._poll_timer = None
        if self._inotify is not None:
            self._loop.remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None
        self._callbacks.clear()
        self._polled.clear()

    def _notified(self) -> None:
        if self._inotify is None:
            return
        called: set[Callable[[], None]] = set()
        for event in self._inotify.read(timeout=0):
            if event.mask & inotify_simple.flags.Q_OVERFLOW:
                called.update(self._callbacks.values())
            elif (callback := self._callbacks.get(event.wd)) is not None:
                called.add(callback)
        for callback in called:
            callback()

    def _poll(self) -> None:
        self._poll_timer = self._loop.call_later(POLL_INTERVAL_S, self._poll) if self._polled else None
        for callback in list(self._polled.values()):
            callback()

    def _unpoll(self, key: object) -> None:
        self._polled.pop(key, None)

    def _remove(self, watches: Iterable[int]) -> None:
        for watch in watches:
            if self._callbacks.pop(watch, None) is not None and self._inotify is not None:
                # The watch is already gone where its file was deleted.
                with contextlib.suppress(OSError):
                    self._inotify.rm_watch(watch)


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at the output files of one execution showed."""

    stdout_bytes: int
    stderr_bytes: int
    events: bytes
    """The events that follow those of the look before."""
    more_events: bool
    """There are further ones: look again."""


class OutputReader:
    """Reads the output files of one execution. Every method may block on a slow disk: call it in a thread.

    Not for several threads at once. A file that is gone counts as empty; any
    other failure to read it is raised, for a log must not lack bytes in silence.
    """

    def __init__(self, files: OutputFiles) -> None:
        """Makes a reader; files are opened when they are first read."""
        self._paths = {
            job_pb2.LOG_STREAM_STDOUT: files.stdout,
            job_pb2.LOG_STREAM_STDERR: files.stderr,
        }
        self._events_path = files.events
        self._fds: dict[Path, int] = {}
        self._events_offset = 0
        self._closed = False

    def look(self) -> Look:
        """Returns how far the files have grown, and new events."""
        events = self._pread(self._events_path, self._events_offset, MAX_EVENT_READ_BYTES)
        self._events_offset += len(events)
        return Look(
            self._size(self._paths[job_pb2.LOG_STREAM_STDOUT]),
            self._size(self._paths[job_pb2.LOG_STREAM_STDERR]),
            events,
            more_events=len(events) == MAX_EVENT_READ_BYTES,
        )

    def read(self, stream: job_pb2.LogStream.ValueType, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes of an output stream; none after :meth:`close`.

        A job that truncates its own output (``> /dev/stdout`` does) takes bytes
        away that are already numbered; they read as NUL, as in a sparse file,
        so that the rest keeps its place.
        """
        if self._closed:
            return b""
        return self._pread(self._paths[stream], offset, length).ljust(length, b"\0")

    def close(self) -> None:
        """Closes the files."""
        self._closed = True
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _fd(self, path: Path) -> int | None:
        if (fd := self._fds.get(path)) is None and not self._closed:
            try:
                fd = self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
        return fd

    def _size(self, path: Path) -> int:
        fd = self._fd(path)
        return os.fstat(fd).st_size if fd is not None else 0

    def _pread(self, path: Path, offset: int, length: int) -> bytes:
        fd = self._fd(path)
        if fd is None:
            return b""
        pieces, missing = [], length
        while missing > 0 and (piece := os.pread(fd, missing, offset)):
            pieces.append(piece)
            offset += len(piece)
            missing -= len(piece)
        return b"".join(pieces)
