"""The keeper's own program: guards one lease, then waits for another, or exits.

Protocol with the zygote, JSON lines. Keeper: ``{}`` once it guards the lease it
was forked with or given, or ``{"error", "taken"}``; ``{"idle": true}`` when it
would take another. Zygote: the next lease's spec. Its end of file lets an idle
keeper exit; one that guards a lease looks at it only after that.

SIGTERM, SIGINT, SIGHUP, SIGQUIT and the job-control signals to the keeper itself are
ignored: stopping an agent's service must not stop its jobs. What a keeper leaves
that was killed, the zygote ends, or the agent where that is gone.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import traceback
from collections.abc import Callable

from lessor_agent.keeper.child import IGNORED, WORKLOAD_UMASK, Child, ChildRefused, close_all_but
from lessor_agent.keeper.directory import LeaseDirectory, LockTaken, listen_homeless
from lessor_agent.keeper.forked_child import ForkedChild
from lessor_agent.keeper.guard import Keeper
from lessor_agent.keeper.kernel import (
    IDLE_TITLE,
    become_subreaper,
    gain_no_privileges,
    keeper_title,
    set_keeper_name,
    set_title,
)
from lessor_agent.keeper.record import DeadlineRecord
from lessor_agent.keeper.spawned_child import CAN_SPAWN, SpawnedChild
from lessor_agent.keeper.spec import KeeperSpec
from lessor_agent.keeper.wakes import Wakes

MAX_LEASES = 1000
"""A keeper that has guarded so many, one after the other, exits: nothing that it may have leaked grows without end."""

_READ_BYTES = 1 << 16


def keep(spec: KeeperSpec, zygote: socket.socket) -> None:
    """Makes this process, which was just forked by the zygote, a keeper.

    Returns when it guards nothing any more and no other lease came.
    """
    wakes = _become_keeper(zygote)
    for number in range(MAX_LEASES):
        if not _guard(spec, zygote, wakes, first=number == 0):
            return
        following = _next_spec(zygote)
        if following is None:
            return
        spec = following


def _become_keeper(zygote: socket.socket) -> Wakes:
    """Does once what holds for all leases, and for their workloads, which inherit it; returns what wakes the keeper."""
    for signum in IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    close_all_but(zygote.fileno())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    gc.enable()
    os.setsid()
    # What the keeper itself makes has its modes said, and its socket is in a directory of its own.
    os.umask(WORKLOAD_UMASK)
    os.chdir("/")
    set_keeper_name()
    become_subreaper()
    if os.geteuid() != 0:
        # A process that gained another user could be signalled neither by the keeper nor by the agent.
        gain_no_privileges()
    return Wakes()


def _guard(spec: KeeperSpec, zygote: socket.socket, wakes: Wakes, *, first: bool) -> bool:
    """Guards one lease until its tree is gone and its outcome is stored. Returns whether this keeper can take another.

    Tells the zygote whether it stands, or why not.
    """
    set_title(keeper_title(spec.lease_id, spec.state_dir))
    try:
        keeper = _prepare(spec, wakes)
    except LockTaken as error:
        _report(zygote, {"error": str(error), "taken": True})
    except (FileNotFoundError, FileExistsError) as error:
        # Somebody else is removing the directory, or has left some of it; whoever asked looks again.
        _report(zygote, {"error": f"{spec.directory}: {error.strerror}", "taken": True})
    except ChildRefused as error:
        _report(zygote, {"error": str(error)})
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        _report(zygote, {"error": f"cannot prepare lease {spec.lease_id} in {spec.directory}: {reason}"})
    else:
        if first:
            _speak_into_memory()
        _report(zygote, {})
        try:
            keeper.run()
        except BaseException:
            traceback.print_exc()
            keeper.keep_log()
            raise
        return keeper.let_go()
    # What a failed start has left open ends with this process.
    return False


def _next_spec(zygote: socket.socket) -> KeeperSpec | None:
    """Waits, guarding nothing, for another lease; None: none will come."""
    _report(zygote, {"idle": True})
    set_title(IDLE_TITLE)
    inbox = bytearray()
    while not inbox.endswith(b"\n"):
        try:
            data = zygote.recv(_READ_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            return None
        inbox += data
    return KeeperSpec.from_text(inbox)


def _report(zygote: socket.socket, report: dict[str, object]) -> None:
    # The zygote may be gone with its agent; whoever comes next finds this keeper by its lock.
    with contextlib.suppress(ConnectionError):
        zygote.sendall(json.dumps(report).encode() + b"\n")


def _prepare(spec: KeeperSpec, wakes: Wakes) -> Keeper:
    directory = LeaseDirectory(spec.directory, spec.lease_id)
    try:
        return _take_guard(spec, directory, wakes)
    except BaseException:
        # The lock goes before the word does: whoever hears it may start over or clean up at once.
        directory.close()
        raise


def _take_guard(spec: KeeperSpec, directory: LeaseDirectory, wakes: Wakes) -> Keeper:
    directory.lock()
    directory.reserve_outcome()
    record_fd = directory.open_file("record", os.O_RDWR)
    record = DeadlineRecord(record_fd, spec.lease_id, spec.boot_id)
    listeners = [directory.listen()]
    if (homeless := listen_homeless()) is not None:
        listeners.append(homeless)
    # The child comes last: where it is forked, each page written to while it waits to begin is copied for it.
    return Keeper(spec, directory, record, record_fd, _make_child(spec, directory, wakes.ring), wakes, listeners)


def _make_child(spec: KeeperSpec, directory: LeaseDirectory, wake: Callable[[], None]) -> Child:
    if spec.identity is not None or not CAN_SPAWN:
        return ForkedChild(spec, directory)
    if spec.open_files is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spec.open_files, hard))
    return SpawnedChild(spec, directory, wake)


def _speak_into_memory() -> None:
    """Has what this process says on standard error stay in memory; the agent's log is no place for it any more."""
    null = os.open(os.devnull, os.O_WRONLY)
    said = os.memfd_create("keeper.log")
    for source, target in ((null, 1), (said, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(said)
