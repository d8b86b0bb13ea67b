"""The workload's first process, as its keeper sees it: what both ways to start one have in common.

It is prepared before the lease is accepted and started by :meth:`Child.begin`;
until then nothing of the job runs. Usually there is no process before that
either: :mod:`.spawned_child` has the C library start one, which copies nothing
of the keeper. A workload of another user has its process forked in advance
(:mod:`.forked_child`), because only that user can tell whether it can work here.
"""

from __future__ import annotations

import errno
import os
import signal
from abc import ABC, abstractmethod
from typing import NamedTuple

from lessor_agent.keeper.directory import LeaseDirectory
from lessor_agent.keeper.spec import KeeperSpec

WORKLOAD_UMASK = 0o022

IGNORED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGPIPE,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGXFSZ,
)
"""What zygote and keeper ignore; a program would inherit it."""

_HOST_LACKS = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})


class ChildRefused(Exception):
    """The workload's process could not be made ready; it is gone."""


class Failure(NamedTuple):
    """Why the workload's process did not become the workload."""

    stage: str
    code: int
    """errno; 0: none."""
    text: str

    @property
    def of_host(self) -> bool:
        """The host had no process or memory left: another host, or another time, may."""
        return self.stage == "spawn" and self.code in _HOST_LACKS


REVOKED = Failure("revoked", 0, "it was stopped before it began")


class Child(ABC):
    """The process that becomes the workload."""

    ready_fd: int | None = None
    """Becomes readable when :meth:`outcome` may be known; None: the keeper is woken in another way."""

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Its process, and the workload's session; None: there is none (yet)."""

    @abstractmethod
    def begin(self) -> None:
        """Lets it become the workload. Called once; it does not wait for that."""

    @abstractmethod
    def outcome(self) -> Failure | bool:
        """Returns True once it has become the workload (or was killed on the way), why it did not, or False: not yet.

        Once it is not False any more, no process of this child can come into
        being.
        """

    @abstractmethod
    def revoke(self) -> None:
        """Stops what is not the workload yet, where no signal could: afterwards :meth:`outcome` may say so."""

    @abstractmethod
    def close(self) -> None:
        """Closes what this object holds. A process that was not let begin ends."""


def describe_failure(failure: Failure, spec: KeeperSpec) -> str:
    """Returns for people why the child could not go on."""
    stage, code, text = failure
    program = spec.argv[0]
    if stage == "identity":
        return f"cannot run as user {spec.identity.name if spec.identity else '?'}: {text}"
    if stage == "lease directory":
        return (
            f"user {spec.identity.name if spec.identity else '?'} cannot reach {spec.directory}: {text}; "
            f"let other users pass through the state directory (chmod o+x {spec.state_dir})"
        )
    if stage == "working directory":
        return f"working directory {spec.working_dir or spec.directory + '/work'}: {text}"
    if stage not in ("exec", "spawn"):
        return f"{stage}: {text}"
    if code == errno.ENOENT:
        if "/" in program:
            return f"no such program: {program} (or the interpreter it names does not exist)"
        return f"no such program: {program} is in no directory of PATH={spec.env.get('PATH', os.defpath)}"
    if code in (errno.EACCES, errno.EPERM):
        return f"not permitted to run {program}: {text}"
    if code == errno.ENOEXEC:
        return f"cannot run {program}: it is neither a program of this machine nor a script that begins with #!"
    if code == errno.E2BIG:
        return f"cannot run {program}: its arguments and environment are larger than the kernel takes"
    return f"cannot run {program}: {text}"


def failure_of(stage: str, error: BaseException) -> Failure:
    """Returns what ``error`` says of ``stage``."""
    code = error.errno if isinstance(error, OSError) and error.errno else 0
    return Failure(stage, code, os.strerror(code) if code else f"{type(error).__name__}: {error}"[:1000])


def make_files(spec: KeeperSpec, directory: LeaseDirectory) -> tuple[int, int]:
    """Makes output files and working directory, owned by whom the workload runs as; returns stdout and stderr."""
    os.mkdir("work", 0o700, dir_fd=directory.fd)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    stdout, stderr, events = (directory.open_file(name, flags) for name in ("stdout", "stderr", "events"))
    if spec.identity is not None:
        uid, gid = spec.identity.uid, spec.identity.gid
        for fd in (stdout, stderr, events):
            os.fchown(fd, uid, gid)
        os.chown("work", uid, gid, dir_fd=directory.fd, follow_symlinks=False)
        # The user may pass through the directory, and neither list nor change it.
        os.fchown(directory.fd, -1, gid)
        os.fchmod(directory.fd, 0o710)
    os.close(events)
    return stdout, stderr


def reset_signals() -> None:
    """Gives this process, and all that is forked from it, what a shell would: all at their default, none blocked."""
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(signum, signal.SIG_DFL)
        except (OSError, ValueError):
            # Numbers the C library keeps for itself cannot be set; they are at their default.
            continue
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def close_all_but(*keep: int) -> None:
    """Closes every descriptor above standard error but these."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, max(map(int, os.listdir("/proc/self/fd"))) + 1)
