"""The process runtime: jobs as processes of the agent's host, each under a keeper.

Everything about an execution lies in ``<state_dir>/leases/<lease_id>/`` and in
its keeper; this module finds the two again after any crash. See
``lessor_agent.keeper`` for the processes involved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from lessor_agent.boottime import boot_id
from lessor_agent.keeper.directory import LeaseDirectory, LockTaken, Outcome, make_lease_directory
from lessor_agent.keeper.groups import remove_abandoned
from lessor_agent.keeper.kernel import read_title
from lessor_agent.keeper.nursery import KeeperRefused, KeeperTaken, Nursery, NurseryFault, ZygoteLost, ZygoteUnavailable
from lessor_agent.keeper.spec import KeeperSpec
from lessor_agent.keeper.tree import read_process, send
from lessor_agent.runtimes.base import (
    Capabilities,
    Execution,
    ExecutionVanished,
    Handle,
    Runtime,
    RuntimeContext,
    RuntimeUnavailable,
    StartRefused,
    StartRequest,
    StopCause,
)
from lessor_agent.runtimes.process_execution import (
    HANDLE_VERSION,
    RUNTIME_NAME,
    ProcessExecution,
    connect_keeper,
    connect_keeper_by_pid,
    end_orphaned,
)
from lessor_agent.runtimes.removal import Removal, remove_tree
from lessor_agent.runtimes.workload_environment import (
    check_strings,
    find_account,
    host_environment,
    identity_of,
    workload_environment,
)

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 8
"""Tries of a start whose zygote died or whose lease another keeper was just taking or leaving."""
_CONNECT_PAUSE_S = 0.01
_CONNECT_PATIENCE_S = 5.0
"""How long a keeper that holds its lock, but does not listen, may take to begin or to end."""


class ProcessRuntime(Runtime):
    """Runs jobs as processes of this host."""

    name: ClassVar[str] = RUNTIME_NAME

    def __init__(self, context: RuntimeContext) -> None:
        self._host_environment = host_environment(os.environ, context.env_allow)
        self._open_files = context.open_files
        self.state_dir = Path(os.path.realpath(context.state_dir))
        self._leases = self.state_dir / "leases"
        self.boot_id = ""
        self._nursery = Nursery(self.state_dir)
        self._removal = Removal()
        self._executions: dict[int, ProcessExecution] = {}
        self._starting: dict[int, asyncio.Task[ProcessExecution]] = {}
        self._callers: Counter[int] = Counter()
        self._discards: set[asyncio.Task[None]] = set()
        self._homeless: dict[int, int] = {}
        """Keepers without a directory, found at open: lease_id → pid."""

    @property
    def capabilities(self) -> Capabilities:
        """It can freeze everywhere, and change the user where the agent runs as root."""
        return Capabilities(can_set_user=os.geteuid() == 0, can_freeze=True)

    @property
    def zygote_pid(self) -> int | None:
        """The process that forks keepers; None while there is none."""
        return self._nursery.pid

    async def open(self) -> None:
        """Makes the directory for leases and starts the zygote; see :meth:`Runtime.open`."""
        if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
            raise RuntimeUnavailable("the process runtime needs Linux 5.4 or newer")
        try:
            self.boot_id = boot_id()
            os.close(os.pidfd_open(os.getpid()))
        except OSError as error:
            raise RuntimeUnavailable(f"the process runtime needs /proc and pidfd_open (Linux 5.4): {error}") from None
        try:
            self._leases.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.capabilities.can_set_user:
                # Workloads of other users pass through here to their own directory; they cannot list it.
                self._leases.chmod(0o711)
        except OSError as error:
            raise RuntimeUnavailable(f"cannot make {self._leases}: {error.strerror}") from None
        try:
            await self._nursery.open()
        except ZygoteUnavailable as error:
            raise RuntimeUnavailable(str(error)) from None
        await asyncio.to_thread(remove_abandoned)
        keepers = await asyncio.to_thread(find_keepers, self.state_dir)
        self._homeless = {lease: pid for lease, pid in keepers.items() if not (self._leases / str(lease)).exists()}

    async def close(self) -> None:
        """Lets go of everything but the executions; ``wait`` calls still pending are cancelled."""
        await asyncio.gather(*self._discards, return_exceptions=True)
        starts = list(self._starting.values())
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        for execution in self._executions.values():
            await execution.let_go()
        self._executions.clear()
        await self._nursery.close()

    async def prepare(self, request: StartRequest) -> Execution:
        """Sets a keeper on the lease; see :meth:`Runtime.prepare`.

        If the caller is cancelled, what was started is ended and removed.
        """
        start = self._starting.get(request.lease_id)
        if start is None:
            start = asyncio.create_task(self._prepare(request), name=f"prepare-{request.lease_id}")
            self._starting[request.lease_id] = start
            start.add_done_callback(lambda _: self._starting.pop(request.lease_id, None))
        self._callers[request.lease_id] += 1
        try:
            return await asyncio.shield(start)
        except asyncio.CancelledError:
            if self._callers[request.lease_id] == 1 and not start.cancelled():
                discard = asyncio.create_task(self._discard(start), name=f"discard-{request.lease_id}")
                self._discards.add(discard)
                discard.add_done_callback(self._discards.discard)
            raise
        finally:
            self._callers[request.lease_id] -= 1
            if not self._callers[request.lease_id]:
                del self._callers[request.lease_id]

    async def adopt(self, handle: Handle) -> Execution:
        """Finds an execution again; see :meth:`Runtime.adopt`.

        Where nothing is left its directory is removed before
        :class:`ExecutionVanished` is raised.
        """
        if handle.runtime != self.name or handle.version != HANDLE_VERSION:
            raise ExecutionVanished(f"handle {handle.runtime} v{handle.version} is none of the process runtime")
        lease_id = int(handle.data["lease_id"])
        path = self._leases / str(lease_id)
        found = await self._find(lease_id)
        if found is None and await self._look_for_keeper(lease_id):
            found = await self._find(lease_id)
        if found is not None:
            return found
        # No keeper answers and nobody wrote how it ended. What may have been left running must not go on.
        await asyncio.to_thread(kill_keeper, self.state_dir, lease_id)
        await end_orphaned(path, lease_id, None, None)
        await asyncio.to_thread(self._remove_unguarded, lease_id)
        raise ExecutionVanished(f"lease {lease_id}: no keeper and no outcome; nothing of it runs")

    async def strays(self) -> list[Handle]:
        """Returns every execution of this state directory, in any state; see :meth:`Runtime.strays`.

        They are those with a directory and those whose keeper runs, its
        directory deleted or not. An execution without a directory has no output
        files.
        """
        keepers = await asyncio.to_thread(find_keepers, self.state_dir)
        found = set(keepers)
        with contextlib.suppress(FileNotFoundError):
            found |= {int(name) for name in os.listdir(self._leases) if name.isdigit()}
        for lease_id, pid in keepers.items():
            if lease_id not in self._executions and not (self._leases / str(lease_id)).exists():
                self._homeless[lease_id] = pid
        return [Handle(self.name, HANDLE_VERSION, {"lease_id": lease_id}) for lease_id in sorted(found)]

    # -- start -----------------------------------------------------------------

    async def _prepare(self, request: StartRequest) -> ProcessExecution:
        path = self._leases / str(request.lease_id)
        spec = await self._spec(request, path)
        try:
            return await self._set_keeper(spec, request.deadline_ns)
        except NurseryFault as error:
            raise StartRefused(str(error)) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise StartRefused(f"cannot prepare {path}: {reason}") from None

    async def _set_keeper(self, spec: KeeperSpec, deadline_ns: int) -> ProcessExecution:
        lease_id, path = spec.lease_id, Path(spec.directory)
        reason = f"lease {lease_id}: keepers came and went {_MAX_ATTEMPTS} times; see {path}/keeper.log"
        for attempt in range(_MAX_ATTEMPTS):
            if attempt > 0:
                # Two that start one lease at the same pace would take its directory from each other each time.
                await asyncio.sleep(random.uniform(0, _CONNECT_PAUSE_S * 2**attempt))
            new = attempt == 0 and self._is_new(lease_id, path)
            if not new:
                found = await self._find(lease_id)
                if found is not None:
                    return found
                if (ended := await self._end_unguarded(lease_id)) is not None:
                    return ended
            try:
                self._make_directory(lease_id, deadline_ns, new=new)
                await self._nursery.fork(spec)
            except ZygoteLost as lost:
                # A keeper may stand now: the lock tells.
                reason = str(lost)
                continue
            except (KeeperTaken, FileNotFoundError):
                # A keeper may stand now, of another call, or one was just leaving: the lock tells.
                continue
            except ZygoteUnavailable as unavailable:
                reason = str(unavailable)
                break
            except (KeeperRefused, OSError):
                await asyncio.to_thread(self._remove_unguarded, lease_id)
                raise
            if (connection := connect_keeper(path, lease_id)) is not None:
                return self._connected(lease_id, connection)
        # Before it is said that nothing was started: a keeper of a fork that was never answered may stand.
        if (found := await self._find(lease_id)) is not None:
            return found
        await asyncio.to_thread(kill_keeper, self.state_dir, lease_id)
        if (ended := await self._end_unguarded(lease_id)) is not None:
            return ended
        raise StartRefused(reason)

    def _is_new(self, lease_id: int, path: Path) -> bool:
        """Makes the directory of a lease that was never started here; returns False if it may have been."""
        if lease_id in self._executions or lease_id in self._homeless:
            return False
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return False
        return True

    async def _spec(self, request: StartRequest, path: Path) -> KeeperSpec:
        if request.working_dir is not None and not request.working_dir.is_absolute():
            raise StartRefused(f"working directory {request.working_dir} is not absolute")
        account = None if request.user is None else await asyncio.to_thread(find_account, request.user)
        identity = None if account is None else await asyncio.to_thread(identity_of, account)
        env = workload_environment(request, str(path), self._host_environment, account)
        check_strings(request.argv, env)
        return KeeperSpec(
            lease_id=request.lease_id,
            boot_id=self.boot_id,
            state_dir=str(self.state_dir),
            directory=str(path),
            argv=list(request.argv),
            env=env,
            working_dir=None if request.working_dir is None else str(request.working_dir),
            identity=identity,
            grace_ns=_ns(request.grace),
            run_timeout_ns=None if request.run_timeout is None else _ns(request.run_timeout),
            open_files=self._open_files,
            on_lost=request.on_lost,
        )

    def _make_directory(self, lease_id: int, deadline_ns: int, *, new: bool) -> None:
        path = str(self._leases / str(lease_id))
        directory = LeaseDirectory(path, lease_id) if new else make_lease_directory(path, lease_id)
        try:
            directory.make_record(self.boot_id, deadline_ns)
        finally:
            directory.close()

    def _remove_unguarded(self, lease_id: int) -> None:
        """Removes a lease's directory unless a keeper holds it."""
        path = self._leases / str(lease_id)
        try:
            directory = LeaseDirectory(str(path), lease_id)
        except OSError:
            return
        try:
            # Held while it is removed, so that no keeper begins in what is about to be gone.
            directory.lock()
            remove_tree(path)
        except LockTaken:
            return
        except OSError:
            log.warning(
                "lease directory not removed", extra={"event": "not_removed", "lease_id": lease_id}, exc_info=True
            )
        finally:
            directory.close()

    async def _end_unguarded(self, lease_id: int) -> ProcessExecution | None:
        """Settles a directory without a keeper and without an outcome, before its lease is started (again).

        Returns:
            An ended execution if the workload was let run there: a lease runs
            once. None if it never was; the directory is gone then.
        """
        path = self._leases / str(lease_id)
        try:
            directory = LeaseDirectory(str(path), lease_id)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            begun = directory.read_begun()
            guarded = directory.locked()
        finally:
            directory.close()
        if guarded:
            return None
        if begun is not None:
            outcome = await end_orphaned(path, lease_id, None, begun)
            return self._ended(lease_id, outcome)
        await asyncio.to_thread(self._remove_unguarded, lease_id)
        return None

    async def _discard(self, start: asyncio.Task[ProcessExecution]) -> None:
        """Ends and removes what a cancelled caller of prepare does not want any more."""
        with contextlib.suppress(StartRefused, asyncio.CancelledError):
            execution = await start
            await execution.stop(StopCause.STALE, timedelta(0))
            await execution.wait()
            await execution.forget()

    # -- finding -----------------------------------------------------------------

    async def _find(self, lease_id: int) -> ProcessExecution | None:
        """Returns the one execution of a lease, live or ended with an outcome; None if there is none."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _CONNECT_PATIENCE_S
        path = self._leases / str(lease_id)
        while True:
            known = self._executions.get(lease_id)
            if known is not None:
                return known
            connection = self._reach(lease_id, path)
            if connection is not None:
                return self._connected(lease_id, connection)
            try:
                directory = LeaseDirectory(str(path), lease_id)
            except (FileNotFoundError, NotADirectoryError):
                return None
            try:
                locked = directory.locked()
                # Read after the lock was seen free: from then on it cannot be about to appear.
                outcome = directory.read_outcome()
            except ValueError as error:
                log.error("outcome is damaged", extra={"event": "outcome_damaged", "problem": str(error)})
                outcome = None
            finally:
                directory.close()
            if outcome is not None:
                return self._ended(lease_id, outcome)
            if not locked or loop.time() >= give_up:
                return None
            # A keeper of a crashed agent's start, caught between its lock and its socket: milliseconds.
            await asyncio.sleep(_CONNECT_PAUSE_S)

    def _reach(self, lease_id: int, path: Path) -> socket.socket | None:
        connection = connect_keeper(path, lease_id)
        if connection is None and (pid := self._homeless.pop(lease_id, None)) is not None:
            connection = connect_keeper_by_pid(pid)
            # Looked at again once it is connected: meanwhile it may have taken another lease.
            if connection is not None and read_title(pid) != (lease_id, str(self.state_dir)):
                connection.close()
                return None
        return connection

    def _connected(self, lease_id: int, connection: socket.socket) -> ProcessExecution:
        if (known := self._executions.get(lease_id)) is not None:
            connection.close()
            return known
        execution = ProcessExecution(lease_id, self._leases / str(lease_id), self)
        execution.connect(connection)
        self._executions[lease_id] = execution
        return execution

    def _ended(self, lease_id: int, outcome: Outcome) -> ProcessExecution:
        execution = ProcessExecution(lease_id, self._leases / str(lease_id), self)
        execution.conclude(outcome)
        self._executions[lease_id] = execution
        return execution

    async def _look_for_keeper(self, lease_id: int) -> bool:
        """Notes the keeper of a lease that runs without its directory. Returns whether there is one."""
        pid = (await asyncio.to_thread(find_keepers, self.state_dir)).get(lease_id)
        if pid is not None:
            self._homeless[lease_id] = pid
        return pid is not None

    # -- what executions ask of it (ExecutionHome) --------------------------------

    async def sweep(self) -> None:
        """Returns once the zygote has ended what it caught of dead keepers' trees."""
        # Without a zygote there is nothing it caught; the search through /proc that follows is then the only one.
        with contextlib.suppress(ZygoteLost, ZygoteUnavailable):
            await self._nursery.sweep()

    async def remove(self, path: Path) -> None:
        """Removes a lease's directory."""
        await self._removal.remove(path)

    def forgotten(self, lease_id: int) -> None:
        """Drops an execution that removed itself."""
        self._executions.pop(lease_id, None)


def kill_keeper(state_dir: Path, lease_id: int) -> None:
    """Kills a keeper that does not answer, and with it its workload's main process. Blocks until it is gone."""
    pid = find_keepers(state_dir).get(lease_id)
    process = None if pid is None else read_process(pid)
    if process is None:
        return
    log.error("keeper does not answer, killing it", extra={"event": "keeper_killed", "lease_id": lease_id})
    # Never halted to look again first: should this agent die then, it would keep no deadline of what it guards now.
    while read_title(process.pid) == (lease_id, str(state_dir)) and send(process, signal.SIGKILL):
        time.sleep(_CONNECT_PAUSE_S)


def find_keepers(state_dir: Path) -> dict[int, int]:
    """Returns the keepers of a state directory that guard a lease on this host: lease_id → pid. Blocks.

    They are known by their command line, so that they are found when the whole
    state directory was deleted; those of other users are not believed.
    """
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (title := read_title(int(name))) is not None and title[1] == str(state_dir):
            found[title[0]] = int(name)
    return found


def _ns(duration: timedelta) -> int:
    return round(duration / timedelta(microseconds=1)) * 1000
