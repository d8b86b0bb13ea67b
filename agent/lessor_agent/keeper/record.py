"""The mapped record: how a deadline reaches the keeper without a word being sent, and that the workload may run.

64 bytes in a file that agent and keeper both map. The agent moves the deadline
forward with one aligned 8-byte store, so that the keeper reads the old or the
new one and never a mixture; a renewal costs no system call and cannot block.
A record that is missing, damaged, of another lease or of another boot reads as
expired: doubt ends a job, it never prolongs one.

One word is the keeper's: when the workload was let run, 0 until then. It is
stored before there is anything that could run, and never cleared: of a damaged
record, too, it is believed, because a lease runs once.
"""

from __future__ import annotations

import mmap
import os
import struct

_MAGIC = b"LESSORKR"
_VERSION = 1
_HEADER = struct.Struct("=8sII16sQ")
"""Magic, version, reserved, boot id, lease id. The deadline and the begin follow."""
_SIZE = 64
_DEADLINE_WORD = _HEADER.size // 8
_BEGUN_WORD = _DEADLINE_WORD + 1
_WORD = struct.Struct("=Q")

EXPIRED = 0
"""The deadline of a record that cannot be trusted."""


def _header(lease_id: int, boot_id: str) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, 0, bytes.fromhex(boot_id.replace("-", "")), lease_id)


class DeadlineRecord:
    """One mapped record. The agent alone writes the deadline, the keeper alone the begin."""

    def __init__(self, fd: int, lease_id: int, boot_id: str) -> None:
        """Maps the record open at ``fd``, which stays the caller's.

        Raises:
            OSError: It cannot be mapped.
            ValueError: It is too short to be a record.
        """
        if os.fstat(fd).st_size < _SIZE:
            raise ValueError("the deadline record is cut short")
        self._expected = _header(lease_id, boot_id)
        self._map = mmap.mmap(fd, _SIZE)
        self._words = memoryview(self._map).cast("Q")

    def deadline_ns(self) -> int:
        """Returns the deadline in CLOCK_BOOTTIME nanoseconds; :data:`EXPIRED` if the record is not to be trusted."""
        if self._map[: len(self._expected)] != self._expected:
            return EXPIRED
        return self._words[_DEADLINE_WORD]

    def renew(self, deadline_ns: int) -> None:
        """Moves the deadline forward to ``deadline_ns``; an earlier one changes nothing."""
        if deadline_ns > self._words[_DEADLINE_WORD]:
            self._words[_DEADLINE_WORD] = deadline_ns

    def note_begun(self, started_at_ns: int) -> None:
        """Notes that the workload may run from now on, in Unix nanoseconds. Not synced: a reboot ends it anyway."""
        self._words[_BEGUN_WORD] = started_at_ns

    def close(self) -> None:
        """Unmaps it. Closing twice does nothing."""
        self._words.release()
        self._map.close()


def write_record(fd: int, lease_id: int, boot_id: str, deadline_ns: int) -> None:
    """Writes a record to ``fd``, every byte of it, so that no later store can meet a full disk.

    The keeper's word of one that is there stays as it is.
    """
    image = _header(lease_id, boot_id) + _WORD.pack(deadline_ns)
    if os.fstat(fd).st_size < _SIZE:
        image = image.ljust(_SIZE, b"\0")
    os.pwrite(fd, image, 0)


def read_begun(fd: int) -> int | None:
    """Returns what :meth:`DeadlineRecord.note_begun` noted in the record open at ``fd``; None: never."""
    word = os.pread(fd, _WORD.size, _BEGUN_WORD * _WORD.size)
    return _WORD.unpack(word)[0] or None if len(word) == _WORD.size else None
