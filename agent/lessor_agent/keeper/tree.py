"""Process trees, as /proc shows them, and how to end one for certain.

A keeper is a subreaper, so everything its workload ever starts, double-forked
or in a session of its own, stays below it: "the tree" is what can be reached
from the keeper by parent links, and it is gone exactly when the keeper has no
child left. Where the keeper itself is dead, :func:`end_lease_processes` finds
the remains by what they inherited.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from lessor_agent.keeper.groups import groups_of, thaw_all

_MAX_PASSES = 64
"""Passes before killing what was found so far; a tree still growing then is killed in rounds."""

_READ_BYTES = 1 << 12
_OWN_CHILDREN = "/proc/thread-self/children"
_DEAD_STATES = frozenset("ZXx")
_STILL_STATES = _DEAD_STATES | frozenset("Tt")
STOPPED = "T"
_RUNS = "R"
RUNNABLE = frozenset("RS")
_THREADS_FIELD = 17
"""Number of ``num_threads`` among the fields after the name in /proc/<pid>/stat, counted from 0."""
_LOOKS = 4
"""How often a living thread is looked for in a process whose first one has exited."""

_out_of_reach: set[tuple[int, int]] = set()
"""(pid, start_ticks) of processes that were reported as not to be signalled, so that each is reported once."""


class Process(NamedTuple):
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    start_ticks: int
    """When it started, in clock ticks since boot: with the pid it names a process for good."""
    state: str
    """Of :attr:`thread`."""
    thread: int
    """A thread that lives: the first one, whose number is the pid, or another if that has exited by itself. The first
    one shows no files, no environment and no group any more then, though the process goes on."""

    @property
    def alive(self) -> bool:
        """False once only its exit status is left: every thread has exited."""
        return self.state not in _DEAD_STATES


def read_process(pid: int) -> Process | None:
    """Returns process ``pid``, or None if there is none that this user may see."""
    found = None
    for _ in range(_LOOKS):
        fields = _read_stat(f"/proc/{pid}/stat")
        if fields is None:
            return None
        found = Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), fields[0].decode(), pid)
        if found.alive or int(fields[_THREADS_FIELD]) <= 1:
            return found
        if other := _living_thread(pid):
            return found._replace(thread=other[0], state=other[1])
    # Its threads come and go faster than they can be looked at.
    return found._replace(state=_RUNS) if found is not None else None


def _living_thread(pid: int) -> tuple[int, str] | None:
    """Returns a thread that has not exited, and its state: one that runs, if any does, and a stopped one last."""
    found: list[tuple[int, str]] = []
    try:
        names = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    for name in names:
        fields = _read_stat(f"/proc/{pid}/task/{name}/stat")
        if fields is not None and (state := fields[0].decode()) not in _DEAD_STATES:
            found.append((int(name), state))
    return min(found, key=lambda each: (each[1] == STOPPED, each[1] not in RUNNABLE), default=None)


def _read_stat(path: str) -> list[bytes] | None:
    """Returns the fields after the name, or None if there is no such process or thread."""
    try:
        fields = _read(path).rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # Where /proc is mounted with hidepid, those of other users cannot be read, and are none of ours.
        return None
    return fields if len(fields) >= 20 else None


def _read(path: str) -> bytes:
    """Returns what a file of /proc holds, at a third of what a file object takes: a tree may have thousands."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        # To the end: the kernel gives whole lines and words, less than was asked for though there is more.
        while more := os.read(fd, _READ_BYTES):
            data += more
    finally:
        os.close(fd)
    return data


def all_processes() -> dict[int, Process]:
    """Returns the process table: pid → process."""
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None}


def below(table: dict[int, Process], roots: Iterable[int]) -> list[Process]:
    """Returns every process that hangs below ``roots``, the roots themselves left out, parents before children."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    queue = list(roots)
    seen = set(queue)
    for pid in queue:
        for child in children.get(pid, ()):
            if child.pid not in seen:
                seen.add(child.pid)
                found.append(child)
                queue.append(child.pid)
    return found


def offspring(root: int) -> Iterator[Process]:
    """Yields every process below ``root`` without looking at all others of the host, parents before their children.

    One may be missed if its parent ends at that moment; what stands still is never
    missed.
    """
    stack = children_of(root)
    seen = {root}
    while stack:
        pid = stack.pop()
        if pid not in seen and (process := read_process(pid)) is not None:
            seen.add(pid)
            yield process
            stack += children_of(pid)


def children_of(pid: int) -> list[int]:
    """Returns the pids of a process's children, the eldest first; those of one that is dead are its keeper's."""
    if not os.path.exists(_OWN_CHILDREN):
        # A kernel without CONFIG_PROC_CHILDREN.
        return [process.pid for process in all_processes().values() if process.parent == pid]
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            children += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
    except (FileNotFoundError, ProcessLookupError):
        # It, or that thread, ended meanwhile: what it leaves goes to another of them, or up to the keeper.
        return children
    return children


def is_stopped(pid: int) -> bool:
    """Returns whether no thread of a process can run before somebody lets it: each is stopped, or has exited.

    The first thread alone does not tell: another may be amid a fork, which SIGSTOP
    does not break off, so that its child is yet to be born.
    """
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    for thread in threads:
        fields = _read_stat(f"/proc/{pid}/task/{thread}/stat")
        # One that ended meanwhile may have made another.
        if fields is None or fields[0].decode() not in _STILL_STATES:
            return False
    return True


def send(process: Process, signum: int) -> bool:
    """Sends ``signum`` to exactly this process, never to one that got its pid later.

    Returns:
        False if it is gone, or dead and not yet reaped, or if this user may not
        signal it (it changed its own user); the last is said on stderr, once.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        now = read_process(process.pid)
        if now is None or now.start_ticks != process.start_ticks or not now.alive:
            return False
        signal.pidfd_send_signal(fd, signum)
    except ProcessLookupError:
        return False
    except PermissionError:
        if (process.pid, process.start_ticks) not in _out_of_reach:
            _out_of_reach.add((process.pid, process.start_ticks))
            # No logger: keepers and the zygote have none, and their stderr is their log.
            os.write(2, f"not permitted to signal process {process.pid}: it runs as another user\n".encode())
        return False
    finally:
        os.close(fd)
    return True


def terminate(processes: Iterable[Process]) -> None:
    """Asks each to stop: SIGTERM, and SIGCONT so that a stopped one can hear it."""
    for process in processes:
        if process.alive and send(process, signal.SIGTERM):
            send(process, signal.SIGCONT)


def freeze_and_kill(find: Callable[[], list[Process]]) -> int:
    """Kills everything ``find`` returns, and what those fork meanwhile.

    Passes of SIGSTOP come first, until one finds nothing new, so that few are born
    while it kills; SIGKILL breaks off a fork that is under way. Children die before
    their parents: a death that leaves a process group without a parent to look after
    it has the kernel send SIGHUP and SIGCONT to those of it that are stopped. It does
    not wait for the dead to be reaped.

    Returns:
        How many processes were killed.
    """
    frozen: dict[tuple[int, int], Process] = {}
    for _ in range(_MAX_PASSES):
        fresh = [p for p in find() if p.alive and (p.pid, p.start_ticks) not in frozen]
        if not fresh:
            break
        for process in fresh:
            frozen[process.pid, process.start_ticks] = process
            send(process, signal.SIGSTOP)
    # They may be in a group that a keeper has frozen, and could not die there.
    groups = groups_of(process.thread for process in frozen.values())
    killed = sum(send(process, signal.SIGKILL) for process in _children_first(frozen.values()))
    thaw_all(groups)
    return killed


def _children_first(processes: Iterable[Process]) -> list[Process]:
    """Returns all of them, each before the one that was its parent when it was read."""
    table = {process.pid: process for process in processes}
    ordered = below(table, {process.parent for process in table.values()} - table.keys())
    placed = set(ordered)
    # What a pid that was given anew meanwhile leaves out, or puts into a circle.
    return [process for process in processes if process not in placed] + ordered[::-1]


def end_lease_processes(lease_directory: str, session: int | None, *, patience_s: float) -> bool:
    """Kills what is left of a lease whose keeper is dead. Blocks; call it in a thread.

    A process belongs to the lease if it was started with its ``LESSOR_EVENTS``,
    holds its stdout, stderr or events file open for writing, is in ``session``,
    or descends from one that does.

    Args:
        lease_directory: Absolute path of the lease's directory.
        session: Session of the workload; None where it may since belong to another.
        patience_s: How long to wait for the killed to disappear.

    Returns:
        True once none is left; False if some still stood after ``patience_s``
        (a process in uninterruptible sleep): call again.
    """
    give_up = time.monotonic() + patience_s
    spare = os.getpid()

    def find() -> list[Process]:
        table = all_processes()
        own = [p for p in table.values() if p.alive and p.pid != spare and _is_of(p, lease_directory, session)]
        return own + [p for p in below(table, [p.pid for p in own]) if p.alive and p.pid != spare]

    while freeze_and_kill(find):
        if time.monotonic() >= give_up:
            return False
        time.sleep(0.005)
    return True


def _is_of(process: Process, lease_directory: str, session: int | None) -> bool:
    if session is not None and process.session == session:
        return True
    mark = b"LESSOR_EVENTS=" + os.fsencode(lease_directory) + b"/events"
    try:
        with open(f"/proc/{process.thread}/environ", "rb") as file:
            if mark in file.read().split(b"\0"):
                return True
        return _writes_into(process.thread, lease_directory)
    except OSError:
        # Gone meanwhile, or of a user whose processes this agent cannot have started.
        return False


def _writes_into(thread: int, lease_directory: str) -> bool:
    # Only writers: an operator's `tail -f` on the same files is none of ours.
    outputs = {
        f"{lease_directory}/{name}{gone}" for name in ("stdout", "stderr", "events") for gone in ("", " (deleted)")
    }
    for fd in os.listdir(f"/proc/{thread}/fd"):
        try:
            if os.readlink(f"/proc/{thread}/fd/{fd}") not in outputs:
                continue
            with open(f"/proc/{thread}/fdinfo/{fd}", encoding="ascii") as file:
                flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
        except FileNotFoundError:
            continue
        if flags & os.O_ACCMODE != os.O_RDONLY:
            return True
    return False
