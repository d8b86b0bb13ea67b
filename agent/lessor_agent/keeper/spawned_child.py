"""A workload's process that the C library starts when the lease begins: one that runs as the keeper's own user.

A fork of a Python process costs a short job more than all else that is done for
it, because each page that either process then writes to is copied.
``posix_spawn`` copies none: until its exec the new process borrows the
keeper's memory, and the thread that asked for it stands still. So it is asked
for in a thread of its own: exec may take as long as a file system that does not
answer, and the keeper must be able to end the workload meanwhile.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator

from lessor_agent.keeper.child import IGNORED, REVOKED, Child, Failure, failure_of, make_files
from lessor_agent.keeper.directory import LeaseDirectory
from lessor_agent.keeper.spec import KeeperSpec

_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80

_Opaque = ctypes.c_ulonglong * 128
"""Room for any of the C library's own structures: the largest has 336 bytes."""

# Looked up once and before any fork.
_libc = ctypes.CDLL(None, use_errno=True)

CAN_SPAWN = hasattr(_libc, "posix_spawn_file_actions_addfchdir_np")
"""This C library can start a process in another directory (glibc 2.29, musl 1.1.24)."""


def _call(name: str, *arguments: object) -> None:
    code = getattr(_libc, name)(*arguments)
    if code:
        raise OSError(code, os.strerror(code))


def _make_attributes() -> ctypes.Array[ctypes.c_ulonglong]:
    """Returns what each workload's process starts with: a session of its own, and a shell's signals."""
    attributes, ignored, none = _Opaque(), _Opaque(), _Opaque()
    _libc.sigemptyset(none)
    _libc.sigemptyset(ignored)
    for signum in IGNORED:
        _libc.sigaddset(ignored, int(signum))
    _call("posix_spawnattr_init", attributes)
    _call("posix_spawnattr_setsigdefault", attributes, ignored)
    _call("posix_spawnattr_setsigmask", attributes, none)
    _call("posix_spawnattr_setflags", attributes, ctypes.c_short(_SETSIGDEF | _SETSIGMASK | _SETSID))
    return attributes


_attributes = _make_attributes()


class SpawnedChild(Child):
    """A process that does not exist before it begins.

    What it has in common with the keeper must be set there: standard input,
    umask, limits, and that it gains no privileges. It inherits no descriptor
    but the standard ones, because all others are closed by exec.
    """

    def __init__(self, spec: KeeperSpec, directory: LeaseDirectory, wake: Callable[[], None]) -> None:
        """Makes its files.

        Args:
            spec: The attempt.
            directory: Its directory.
            wake: Called, in another thread, when :meth:`outcome` is known.

        Raises:
            OSError: The files cannot be made.
        """
        self._spec = spec
        self._wake = wake
        self._pid: int | None = None
        self._outcome: Failure | bool = False
        self._permit = [True]
        """Whoever takes it out decides: the thread that starts the process, or the keeper that it never will."""
        self._revoked = False
        self._fds = list(make_files(spec, directory))
        # Open, so that it is found even if the lease's directory is deleted before it begins.
        self._fds.append(directory.open_file("work", os.O_PATH | os.O_DIRECTORY))

    @property
    def pid(self) -> int | None:
        """The process; see :attr:`Child.pid`. Known as soon as :meth:`outcome` is."""
        return self._pid

    def begin(self) -> None:
        """Has it started; see :meth:`Child.begin`."""
        try:
            _thread.start_new_thread(self._start, ())
        except RuntimeError:
            self._outcome = Failure("spawn", errno.EAGAIN, os.strerror(errno.EAGAIN))
            self._wake()

    def outcome(self) -> Failure | bool:
        """Whether it was; see :meth:`Child.outcome`."""
        return self._outcome

    def revoke(self) -> None:
        """Has it never start if it has not yet; see :meth:`Child.revoke`."""
        # Before it is tried to take the permit: of an attempt to start it that is under way there is no other after.
        self._revoked = True
        with contextlib.suppress(IndexError):
            self._permit.pop()
            self._outcome = REVOKED

    def close(self) -> None:
        """Closes its files; see :meth:`Child.close`."""
        while self._fds:
            os.close(self._fds.pop())

    def _start(self) -> None:
        outcome: Failure | bool
        try:
            outcome = self._spawn() or True
        except BaseException as error:
            # Whatever it is, the keeper is told: else it would wait for it until the lease ends.
            outcome = failure_of("spawn", error)
        self._outcome = outcome
        self._wake()

    def _spawn(self) -> Failure | None:
        spec = self._spec
        argv = _strings([os.fsencode(argument) for argument in spec.argv])
        env = _strings([os.fsencode(name) + b"=" + os.fsencode(value) for name, value in spec.env.items()])
        actions = self._actions()
        pid = ctypes.c_int()
        refusal = errno.ENOENT
        try:
            for path in _candidates(spec):
                if self._revoked:
                    return REVOKED
                try:
                    permit = self._permit.pop()
                except IndexError:
                    return REVOKED
                # The keeper's own thread goes on meanwhile.
                code = _libc.posix_spawn(ctypes.byref(pid), path, actions, _attributes, argv, env)
                if code:
                    self._permit.append(permit)
                else:
                    self._pid = pid.value
                    return None
                if code not in (errno.ENOENT, errno.ENOTDIR):
                    # As a shell does: the first reason other than "not here" counts.
                    refusal = code if refusal == errno.ENOENT else refusal
                    if self._directory_failure() is not None:
                        break
        finally:
            _libc.posix_spawn_file_actions_destroy(actions)
        return self._directory_failure() or Failure("spawn", refusal, os.strerror(refusal))

    def _actions(self) -> ctypes.Array[ctypes.c_ulonglong]:
        stdout, stderr, work = self._fds
        actions = _Opaque()
        _call("posix_spawn_file_actions_init", actions)
        _call("posix_spawn_file_actions_adddup2", actions, stdout, 1)
        _call("posix_spawn_file_actions_adddup2", actions, stderr, 2)
        if self._spec.working_dir is None:
            _call("posix_spawn_file_actions_addfchdir_np", actions, work)
        else:
            _call("posix_spawn_file_actions_addchdir_np", actions, os.fsencode(self._spec.working_dir))
        return actions

    def _directory_failure(self) -> Failure | None:
        """Returns why the process could not go where it was to start, if that is why it could not start."""
        if self._spec.working_dir is None:
            return None
        try:
            # The C library does not tell which step failed. The keeper itself stands nowhere in particular.
            os.chdir(self._spec.working_dir)
        except OSError as error:
            return failure_of("working directory", error)
        os.chdir("/")
        return None


def _strings(strings: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(strings) + 1))(*strings, None)


def _candidates(spec: KeeperSpec) -> Iterator[bytes]:
    """Yields the paths the program may have, those left out of which is certain that nothing is there."""
    program = os.fsencode(spec.argv[0])
    if b"/" in program:
        yield program
        return
    for directory in os.get_exec_path(spec.env):
        path = os.path.join(os.fsencode(directory), program)
        # A relative one is relative to where the workload starts.
        if not os.path.isabs(path) or _may_exist(path):
            yield path


def _may_exist(path: bytes) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
