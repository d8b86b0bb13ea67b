"""The agent's state directory: made private, held by one agent, known by one lasting id."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from pathlib import Path
from types import TracebackType

_OWNER_ONLY = 0o600


class StateDirError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


class StateDir:
    """A state directory, locked while this object is open.

    The lock belongs to the open file: it goes with the process, however that
    ends, and no keeper inherits it.
    """

    def __init__(self, path: Path) -> None:
        """Makes ``path`` if it is missing, and takes its lock.

        Made by root it can be passed through by everybody (0711), and so can
        the directories made above it: jobs of other users must reach their own
        directory. Else it is its owner's alone (0700). One that exists keeps its
        mode.

        Raises:
            StateDirError: It cannot be made or written, or another agent has it.
        """
        self.path = path.absolute()
        self._lock_fd = -1
        try:
            _make_directories(self.path, 0o711 if os.geteuid() == 0 else 0o700)
            self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateDirError(
                f"cannot use the state directory {self.path}: {error.strerror or error}; "
                "give one that this user can write with --state-dir"
            ) from error
        try:
            self._take_lock()
            self.agent_id = self._read_agent_id()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> StateDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StateDirError(f"cannot lock the state directory {self.path}: {error.strerror}") from error
            holder = os.pread(self._lock_fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StateDirError(
                f"another agent (pid {holder}) uses the state directory {self.path}; "
                "stop it or give another --state-dir"
            ) from error
        try:
            os.ftruncate(self._lock_fd, 0)
            os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode("ascii"), 0)
        except OSError:
            # A full disk: the lock holds all the same, only its note is missing.
            return

    def _read_agent_id(self) -> str:
        path = self.path / "agent_id"
        try:
            if path.exists() and (agent_id := path.read_text("ascii").strip()):
                with contextlib.suppress(PermissionError):
                    # Another user's, and readable: it serves all the same.
                    path.chmod(_OWNER_ONLY)
                return agent_id
            agent_id = str(uuid.uuid4())
            fresh = path.with_suffix(".new")
            with open(fresh, "w", encoding="ascii") as file:
                os.fchmod(file.fileno(), _OWNER_ONLY)
                file.write(agent_id + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except (OSError, UnicodeDecodeError) as error:
            raise StateDirError(f"cannot read or write the agent's id in {path}: {error}") from error
        return agent_id


def read_agent_id(path: Path) -> str:
    """Returns the id of the agent that lives, or has lived, in the state directory ``path``.

    Raises:
        StateDirError: None has, or it cannot be read.
    """
    try:
        agent_id = (path / "agent_id").read_text("ascii").strip()
    except FileNotFoundError:
        agent_id = ""
    except (OSError, UnicodeDecodeError) as error:
        raise StateDirError(f"cannot read the agent's id in {path / 'agent_id'}: {error}") from error
    if not agent_id:
        raise StateDirError(f"no agent has lived in the state directory {path}; give its own with --state-dir")
    return agent_id


def _make_directories(path: Path, mode: int) -> None:
    """Makes ``path`` and what is missing above it with ``mode``, whatever the umask."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        directory.chmod(mode)
