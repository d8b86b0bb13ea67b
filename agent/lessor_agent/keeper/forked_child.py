"""A workload's process that is forked when the lease is prepared: one that runs as another user.

It does all that can fail for reasons of that user, and waits for one byte
before it becomes the workload.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
from typing import NoReturn

from lessor_agent.keeper.child import (
    IGNORED,
    WORKLOAD_UMASK,
    Child,
    ChildRefused,
    Failure,
    close_all_but,
    describe_failure,
    failure_of,
    make_files,
)
from lessor_agent.keeper.directory import LeaseDirectory
from lessor_agent.keeper.kernel import die_with_parent, gain_no_privileges
from lessor_agent.keeper.spec import Identity, KeeperSpec

_READY = b"ready"
_READY_TIMEOUT_MS = 10_000
_REPORT_BYTES = 4096


class ForkedChild(Child):
    """A process that waits to begin. If its keeper is killed, the kernel kills it."""

    def __init__(self, spec: KeeperSpec, directory: LeaseDirectory) -> None:
        """Forks it, and returns once it has shown that it can work here.

        Raises:
            ChildRefused: It cannot; the message says why and what to do.
            OSError: The files cannot be made, or no process can be forked.
        """
        outputs = make_files(spec, directory)
        keeper_pid = os.getpid()
        begin_read, self._begin_fd = os.pipe()
        report_read, report_write = os.pipe()
        try:
            self._pid = os.fork()
        except OSError:
            for fd in (begin_read, self._begin_fd, report_read, report_write, *outputs):
                os.close(fd)
            raise
        if self._pid == 0:
            _become_workload(spec, keeper_pid, outputs, begin_read, report_write)
        for fd in (begin_read, report_write, *outputs):
            os.close(fd)
        self.ready_fd: int | None = report_read
        self._outcome: Failure | bool = False
        poll = select.poll()
        poll.register(report_read, select.POLLIN)
        report = os.read(report_read, _REPORT_BYTES) if poll.poll(_READY_TIMEOUT_MS) else b""
        os.set_blocking(report_read, False)
        if report == _READY:
            return
        self.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        if not report:
            raise ChildRefused("the workload's process died before it was ready")
        raise ChildRefused(describe_failure(Failure(*json.loads(report)), spec))

    @property
    def pid(self) -> int:
        """The process; see :attr:`Child.pid`."""
        return self._pid

    def begin(self) -> None:
        """Lets it exec; see :meth:`Child.begin`."""
        os.write(self._begin_fd, b"B")

    def outcome(self) -> Failure | bool:
        """Whether it has; see :meth:`Child.outcome`."""
        if self._outcome is False and self.ready_fd is not None:
            try:
                report = os.read(self.ready_fd, _REPORT_BYTES)
            except BlockingIOError:
                return False
            self._outcome = Failure(*json.loads(report)) if report else True
        return self._outcome

    def revoke(self) -> None:
        """Does nothing: there is a process, which is killed as any other; see :meth:`Child.revoke`."""

    def close(self) -> None:
        """Closes its pipes; see :meth:`Child.close`."""
        if self.ready_fd is not None:
            os.close(self.ready_fd)
            os.close(self._begin_fd)
            self.ready_fd = None


def _become_workload(
    spec: KeeperSpec, keeper_pid: int, outputs: tuple[int, int], begin_fd: int, report_fd: int
) -> NoReturn:
    stage = "start"
    try:
        for signum in IGNORED:
            signal.signal(signum, signal.SIG_DFL)
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (outputs[0], 1), (outputs[1], 2)):
            os.dup2(source, target)
        close_all_but(begin_fd, report_fd)
        os.umask(WORKLOAD_UMASK)
        if spec.open_files is not None:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (spec.open_files, hard))
        if os.geteuid() != 0:
            # A process that gained another user could be signalled neither by the keeper nor by the agent.
            gain_no_privileges()
        stage = "identity"
        if spec.identity is not None:
            _become_user(spec.identity)
        # After the change of user, which would have undone it.
        die_with_parent(signal.SIGKILL)
        if os.getppid() != keeper_pid:
            os._exit(1)
        stage = "lease directory"
        os.close(os.open(f"{spec.directory}/events", os.O_WRONLY | os.O_APPEND))
        os.chdir(f"{spec.directory}/work")
        os.write(report_fd, _READY)
        if os.read(begin_fd, 1) != b"B":
            os._exit(1)
        os.close(begin_fd)
        stage = "working directory"
        if spec.working_dir is not None:
            os.chdir(spec.working_dir)
        stage = "exec"
        os.execvpe(spec.argv[0], spec.argv, spec.env)
    except BaseException as error:
        os.write(report_fd, json.dumps(failure_of(stage, error)).encode())
    finally:
        os._exit(127)


def _become_user(identity: Identity) -> None:
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
