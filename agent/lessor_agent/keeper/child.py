"""The workload's first process: from fork to exec.

It is forked when the lease is prepared, does all that can fail for reasons of
the host, and waits for one byte before it becomes the workload. Until that byte
nothing of the job has run.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
from typing import NamedTuple, NoReturn

from lessor_agent.keeper.directory import LeaseDirectory
from lessor_agent.keeper.kernel import die_with_parent, gain_no_privileges
from lessor_agent.keeper.spec import Identity, KeeperSpec

_READY_TIMEOUT_MS = 10_000
_REPORT_BYTES = 4096
_WORKLOAD_UMASK = 0o022


class ChildRefused(Exception):
    """The workload's process could not be made ready; it is gone."""


class Child(NamedTuple):
    """A child that waits to begin."""

    pid: int
    begin_fd: int
    """One byte written here lets it exec; closing it instead ends it."""
    report_fd: int
    """End of file: it has become the workload, or died. Bytes: why it could not."""


def fork_child(spec: KeeperSpec, directory: LeaseDirectory) -> Child:
    """Forks the child.

    One that runs as another user is waited for until it has shown that this
    user can work here; for any other that is not in doubt, and it gets ready
    while the agent is told.

    Raises:
        ChildRefused: It cannot work here; the message says why and what to do.
        OSError: The files cannot be made, or no process can be forked.
    """
    outputs = _make_files(spec, directory)
    keeper_pid = os.getpid()
    begin_read, begin_write = os.pipe()
    report_read, report_write = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        for fd in (begin_read, begin_write, report_read, report_write, *outputs):
            os.close(fd)
        raise
    if pid == 0:
        _become_workload(spec, keeper_pid, outputs, begin_read, report_write)
    for fd in (begin_read, report_write, *outputs):
        os.close(fd)
    if spec.identity is None:
        return Child(pid, begin_write, report_read)
    poll = select.poll()
    poll.register(report_read, select.POLLIN)
    report = os.read(report_read, _REPORT_BYTES) if poll.poll(_READY_TIMEOUT_MS) else b""
    if report == b"ready":
        return Child(pid, begin_write, report_read)
    os.close(begin_write)
    os.close(report_read)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise ChildRefused(describe_failure(report, spec) if report else "the workload's process died before it was ready")


def describe_failure(report: bytes, spec: KeeperSpec) -> str:
    """Returns for people why the child could not go on; ``report`` is what it wrote."""
    data = json.loads(report)
    stage, code, text = data["stage"], data["errno"], data["text"]
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
    if stage != "exec":
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


def _make_files(spec: KeeperSpec, directory: LeaseDirectory) -> tuple[int, int]:
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


def _become_workload(
    spec: KeeperSpec, keeper_pid: int, outputs: tuple[int, int], begin_fd: int, report_fd: int
) -> NoReturn:
    stage = "start"
    try:
        _reset_signals()
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (outputs[0], 1), (outputs[1], 2)):
            os.dup2(source, target)
        _close_others({0, 1, 2, begin_fd, report_fd})
        os.umask(_WORKLOAD_UMASK)
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
        if spec.identity is not None:
            os.write(report_fd, b"ready")
        if os.read(begin_fd, 1) != b"B":
            os._exit(1)
        os.close(begin_fd)
        stage = "working directory"
        if spec.working_dir is not None:
            os.chdir(spec.working_dir)
        stage = "exec"
        os.execvpe(spec.argv[0], spec.argv, spec.env)
    except BaseException as error:
        code = error.errno if isinstance(error, OSError) and error.errno else 0
        text = os.strerror(code) if code else f"{type(error).__name__}: {error}"[:1000]
        os.write(report_fd, json.dumps({"stage": stage, "errno": code, "text": text}).encode())
    finally:
        os._exit(127)


def _reset_signals() -> None:
    """Gives the workload what a shell would: every signal at its default, none blocked."""
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(signum, signal.SIG_DFL)
        except (OSError, ValueError):
            # Numbers the C library keeps for itself cannot be set; they are at their default.
            continue
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _become_user(identity: Identity) -> None:
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)


def _close_others(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                # The descriptor the listing itself used.
                continue
