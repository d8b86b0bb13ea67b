"""The directory of one lease, ``<state_dir>/leases/<lease_id>/``, and what lies in it.

======================  =====================================================
``record``              the deadline, and whether the workload was let run (see :mod:`.record`): that it was not, with
                        a free lock, proves that it never ran. The keeper holds its lock (flock) while it guards the
                        lease, so it is never replaced. Behind these, how it ended: written whole, before the lock is
                        let go
``control``             the keeper's unix socket
``stdout`` ``stderr``   the workload's output
``events``              the workload's events, JSON lines
``cancel``              made when the workload is asked to stop
``work``                the workload's working directory, unless the job names one
``keeper.log``          what went wrong in the keeper itself; normally there is none
======================  =====================================================

There are no more files than are needed: a file system may take longer to make
one than the host for all else that a short job needs (ext4 without a journal
does, where many were removed in the last minutes).

The keeper works through a descriptor of the directory, the agent through its
path: a keeper whose directory was deleted goes on and can be found in /proc.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import struct
import zlib
from typing import NamedTuple

from lessor_agent.keeper.record import DeadlineRecord, read_begun, write_record

_OUTCOME_AT = 4096
_OUTCOME_BYTES = 16384
"""Where in the record the outcome stands, and the room it has: a header, and JSON."""
_OUTCOME_HEADER = struct.Struct("=II")
"""Length and checksum of the JSON; all zero until it is there."""
_MAX_ERROR_CHARS = 1000
_PEER = struct.Struct("=iII")
_OWNER_ONLY = 0o600


class LockTaken(Exception):
    """Another keeper guards this lease."""


class Outcome(NamedTuple):
    """How an execution ended, as the keeper writes it down. Times are Unix nanoseconds."""

    lease_id: int
    exit_code: int | None
    signal: int
    stop_cause: str | None
    start_error: str | None
    started_at_ns: int | None
    ended_at_ns: int

    def to_json(self) -> dict[str, object]:
        """Returns the stored form."""
        error = self.start_error
        if error is not None and len(error) > _MAX_ERROR_CHARS:
            error = error[:_MAX_ERROR_CHARS] + "…"
        return {"version": 1, **self._replace(start_error=error)._asdict()}

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Outcome:
        """Reads the stored form.

        Raises:
            ValueError: It is not an outcome.
        """
        try:
            return cls(**{name: data[name] for name in cls._fields})  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an outcome: {error}") from None


class LeaseDirectory:
    """A lease's directory, held open. Closing lets go of the lock as well."""

    def __init__(self, path: str, lease_id: int) -> None:
        """Opens it.

        Raises:
            FileNotFoundError: There is none.
        """
        self.path = path
        self.lease_id = lease_id
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock_fd = -1
        self._outcome_fd = -1

    def close(self) -> None:
        """Closes it. Closing twice does nothing."""
        for name in ("fd", "_lock_fd", "_outcome_fd"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    @property
    def deleted(self) -> bool:
        """True once nobody can find it by its path."""
        return os.fstat(self.fd).st_nlink == 0

    def open_file(self, name: str, flags: int, mode: int = _OWNER_ONLY) -> int:
        """Opens a file in it and returns the descriptor, close-on-exec."""
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=self.fd)

    def lock(self) -> None:
        """Takes the lock until :meth:`close`.

        Raises:
            LockTaken: A keeper holds it, or the directory was removed meanwhile.
        """
        fd = self.open_file("record", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LockTaken(f"lease {self.lease_id} has a keeper") from None
        if os.fstat(fd).st_nlink == 0:
            os.close(fd)
            raise LockTaken(f"the directory of lease {self.lease_id} was removed")
        self._lock_fd = fd

    def locked(self) -> bool:
        """Returns whether a keeper lives, or one is just beginning or ending."""
        try:
            fd = self.open_file("record", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    # -- the deadline ------------------------------------------------------

    def make_record(self, boot_id: str, deadline_ns: int) -> None:
        """Makes the record where there is none; an existing one is renewed to ``deadline_ns``.

        One that is not to be trusted (of an earlier boot, say) is made anew in its place.
        """
        fd = self.open_file("record", os.O_RDWR | os.O_CREAT)
        try:
            if os.fstat(fd).st_size:
                with (
                    contextlib.suppress(ValueError),
                    contextlib.closing(DeadlineRecord(fd, self.lease_id, boot_id)) as record,
                ):
                    if record.deadline_ns():
                        record.renew(deadline_ns)
                        return
            write_record(fd, self.lease_id, boot_id, deadline_ns)
        finally:
            os.close(fd)

    def map_record(self, boot_id: str) -> DeadlineRecord:
        """Maps the existing record.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is cut short.
        """
        fd = self.open_file("record", os.O_RDWR)
        try:
            return DeadlineRecord(fd, self.lease_id, boot_id)
        finally:
            os.close(fd)

    # -- begin and end -----------------------------------------------------

    def read_begun(self) -> int | None:
        """Returns when the workload was let run, in Unix nanoseconds, as its keeper noted; None: never."""
        try:
            fd = self.open_file("record", os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return read_begun(fd)
        finally:
            os.close(fd)

    def reserve_outcome(self) -> None:
        """Takes the room the outcome will need, so that a full disk cannot lose it."""
        self._outcome_fd = self.open_file("record", os.O_RDWR | os.O_CREAT)
        if os.fstat(self._outcome_fd).st_size < _OUTCOME_AT + _OUTCOME_BYTES:
            os.pwrite(self._outcome_fd, bytes(_OUTCOME_BYTES), _OUTCOME_AT)

    def write_outcome(self, outcome: Outcome) -> None:
        """Stores the outcome durably: after this returns it is there after any crash; half of it is none.

        Raises:
            OSError: It could not be stored.
        """
        if self._outcome_fd < 0:
            self.reserve_outcome()
        text = json.dumps(outcome.to_json()).encode()
        os.pwrite(self._outcome_fd, _OUTCOME_HEADER.pack(len(text), zlib.crc32(text)) + text, _OUTCOME_AT)
        os.fsync(self._outcome_fd)
        os.fsync(self.fd)
        os.close(self._outcome_fd)
        self._outcome_fd = -1

    def read_outcome(self) -> Outcome | None:
        """Returns the stored outcome, or None.

        Raises:
            ValueError: It is damaged.
        """
        try:
            fd = self.open_file("record", os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            image = os.pread(fd, _OUTCOME_BYTES, _OUTCOME_AT)
        finally:
            os.close(fd)
        if not any(image[: _OUTCOME_HEADER.size]):
            return None
        length, checksum = _OUTCOME_HEADER.unpack(image[: _OUTCOME_HEADER.size].ljust(_OUTCOME_HEADER.size, b"\0"))
        text = image[_OUTCOME_HEADER.size : _OUTCOME_HEADER.size + length]
        if len(text) < length or zlib.crc32(text) != checksum:
            raise ValueError(f"the outcome in {self.path}/record is damaged")
        return Outcome.from_json(json.loads(text))

    # -- the control socket ------------------------------------------------

    def listen(self) -> socket.socket:
        """Binds the control socket; the lock must be held.

        A bound path has at most 107 bytes, which a state directory easily
        exceeds, so the kernel is led there through the open directory.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink("control", dir_fd=self.fd)
        return _listening(f"/proc/self/fd/{self.fd}/control")

    def connect(self) -> socket.socket:
        """Connects to the keeper.

        Raises:
            OSError: No keeper listens.
        """
        return _connected(f"/proc/self/fd/{self.fd}/control")


def listen_homeless() -> socket.socket | None:
    """Binds the socket by which this keeper is reached if its directory is deleted; None if the name is taken.

    It lives in the abstract namespace under the keeper's pid.
    """
    try:
        return _listening(_homeless_address(os.getpid()))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise


def connect_homeless(pid: int) -> socket.socket:
    """Connects to keeper ``pid`` without its directory.

    Raises:
        OSError: No keeper listens, or somebody else took its name.
    """
    connection = _connected(_homeless_address(pid))
    if peer(connection) != (pid, os.geteuid()):
        connection.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"the socket of keeper {pid} belongs to another process")
    return connection


def peer(connection: socket.socket) -> tuple[int, int]:
    """Returns (pid, uid) of the process at the other end; of a listener, the process that listens."""
    pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid


def make_lease_directory(path: str, lease_id: int) -> LeaseDirectory:
    """Makes the directory where there is none, and opens it."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise
    return LeaseDirectory(path, lease_id)


def _homeless_address(pid: int) -> str:
    return f"\0lessor-keeper/{pid}"


def _listening(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _connected(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        # A local connect succeeds or fails at once; only a full backlog would block, and that is an answer too.
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection
