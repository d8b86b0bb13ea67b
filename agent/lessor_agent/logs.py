"""What executions write: noticed through inotify, read off the event loop's thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import inotify_simple

from lessor.v1 import job_pb2
from lessor_agent.runtimes.base import OutputFiles

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.1
"""How often files are looked at where inotify cannot be had."""

MAX_EVENT_READ_BYTES = 64 * 1024
"""Bytes of an events file taken per look, so that one chatty job cannot hold up the others."""

MAX_FINAL_EVENT_BYTES = 2 * 1024 * 1024
"""Unread bytes of an events file that are still read once the job is over: its last ones."""

_SHORT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})
"""Failures that say nothing about the file: another try may succeed."""


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
    events_skipped: bool = False
    """Events before these were left out; these begin somewhere within a line."""
    short: bool = False
    """The host lacked something to read with (descriptors, memory): look again later."""


class OutputReader:
    """Reads the output files of one execution. Every method may block on a slow disk: call it in a thread.

    Not for several threads at once, and it never raises. A file that is gone
    counts as empty. One that cannot be read, or is no file (a job can do that to
    its own), ends with what was seen of it: that is said in the log, once.
    """

    def __init__(self, files: OutputFiles, lease_id: int = 0) -> None:
        """Makes a reader; files are opened when they are first read. ``lease_id`` is for log lines."""
        self._lease_id = lease_id
        self._paths = {
            job_pb2.LOG_STREAM_STDOUT: files.stdout,
            job_pb2.LOG_STREAM_STDERR: files.stderr,
        }
        self._events_path = files.events
        self._fds: dict[Path, int] = {}
        self._events_offset = 0
        self._events_end: int | None = None
        self._sizes: dict[Path, int] = {}
        self._broken: set[Path] = set()
        self._short = False
        self._closed = False

    def look(self, *, final: bool = False) -> Look:
        """Returns how far the files have grown, and new events.

        Args:
            final: The job is over. Of the events that nobody has read, no more
                than the last :data:`MAX_FINAL_EVENT_BYTES` follow.
        """
        self._short = False
        skipped = False
        if final and self._events_end is None:
            self._events_end = self._size(self._events_path)
            begin = self._events_end - MAX_FINAL_EVENT_BYTES
            if skipped := begin > self._events_offset:
                # One byte earlier: what is thrown away up to the first newline is then never a whole line.
                self._events_offset = begin - 1
                self._log("the last events of a job that wrote too many are read, others are not", self._events_path)
        length = MAX_EVENT_READ_BYTES
        if self._events_end is not None:
            length = max(0, min(length, self._events_end - self._events_offset))
        events = self._pread(self._events_path, self._events_offset, length) or b""
        self._events_offset += len(events)
        return Look(
            self._size(self._paths[job_pb2.LOG_STREAM_STDOUT]),
            self._size(self._paths[job_pb2.LOG_STREAM_STDERR]),
            events,
            more_events=len(events) == MAX_EVENT_READ_BYTES,
            events_skipped=skipped,
            short=self._short,
        )

    def read(self, stream: job_pb2.LogStream.ValueType, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes of an output stream; none after :meth:`close`.

        None, too, where the host lacks something to read with: they are asked
        for again. A job that truncates its own output (``> /dev/stdout`` does)
        takes bytes away that are already numbered; they read as NUL, as in a
        sparse file, so that the rest keeps its place. So do bytes that were seen
        and cannot be read any more.
        """
        if self._closed:
            return b""
        data = self._pread(self._paths[stream], offset, length)
        return b"" if data is None else data.ljust(length, b"\0")

    def close(self) -> None:
        """Closes the files."""
        self._closed = True
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _fd(self, path: Path) -> int | None:
        if (fd := self._fds.get(path)) is None and not self._closed and path not in self._broken:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.EINVAL, "it is not a regular file")
            self._fds[path] = fd
        return fd

    def _size(self, path: Path) -> int:
        try:
            fd = self._fd(path)
            if fd is not None:
                self._sizes[path] = os.fstat(fd).st_size
            elif path not in self._broken:
                return 0
        except OSError as error:
            self._failed(path, error)
        return self._sizes.get(path, 0)

    def _pread(self, path: Path, offset: int, length: int) -> bytes | None:
        """Returns up to ``length`` bytes; None if another try may bring more."""
        pieces, missing = [], length
        try:
            fd = self._fd(path)
            while fd is not None and missing > 0 and (piece := os.pread(fd, missing, offset)):
                pieces.append(piece)
                offset += len(piece)
                missing -= len(piece)
        except OSError as error:
            self._failed(path, error)
            if path not in self._broken:
                return None
        return b"".join(pieces)

    def _failed(self, path: Path, error: OSError) -> None:
        if error.errno in _SHORT_OF:
            self._short = True
            return
        self._broken.add(path)
        if (fd := self._fds.pop(path, None)) is not None:
            os.close(fd)
        self._log(f"a job's file cannot be read; it ends where it was: {error.strerror}", path)

    def _log(self, text: str, path: Path) -> None:
        log.warning(text, extra={"event": "output", "lease_id": self._lease_id, "path": str(path)})
