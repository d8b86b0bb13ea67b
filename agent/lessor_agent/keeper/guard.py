"""The guard of one lease: from prepare to the end of its tree.

One poll loop, and a second thread only while the workload is being started (see
:mod:`.spawned_child`). It is woken by the death of a child, by the agent, by the
workload's exec, and by the clock: at the next moment something is due, and at
least every 500 ms, because a poll does not count the time a host is suspended
and the deadline does.

Protocol on the control socket, JSON lines. Agent: ``{"op": "begin"}``,
``{"op": "stop", "cause", "grace_ms"}``. Keeper, at connect and at each change:
``{"state": "prepared" | "running" | "ended", "frozen", "pid", "started_at_ns",
"record_fd", "outcome"}``. Several agents may be connected; each has equal say.
The outcome is told, and then hung up, when the lease is guarded no more: the
tree is gone, the outcome stored (unless the disk is full), the lock free.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time

from lessor_agent.boottime import NS_PER_MS, boottime_ns
from lessor_agent.keeper.child import REVOKED, Child, Failure, describe_failure
from lessor_agent.keeper.directory import LeaseDirectory, Outcome, peer
from lessor_agent.keeper.freezer import Freezer, Stillness
from lessor_agent.keeper.kernel import LEAVING_TITLE, set_title
from lessor_agent.keeper.record import DeadlineRecord
from lessor_agent.keeper.spawned_child import SpawnedChild
from lessor_agent.keeper.spec import KeeperSpec
from lessor_agent.keeper.tree import Process, all_processes, below, freeze_and_kill, terminate
from lessor_agent.keeper.verdict import KEEPER_DIED, LEASE_LOST, LEFTOVER_GRACE_NS, STOP, Step, judge
from lessor_agent.keeper.wakes import Wakes

_MAX_POLL_MS = 500
_KILL_POLL_MS = (5, 200)
"""Between rounds of killing: at first, and at most, when something cannot die yet."""
_FREEZE_POLL_MS = (2, 50)
"""Between looks at a tree that is not known to stand still yet."""
_STILL_REST = 20
"""A tree that stands still is looked at again after so many times what a look took, and not before the usual poll."""
_THAW_AGAIN_MS = 200
_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 16


class Keeper:
    """One lease under guard."""

    def __init__(
        self,
        spec: KeeperSpec,
        directory: LeaseDirectory,
        record: DeadlineRecord,
        record_fd: int,
        child: Child,
        wakes: Wakes,
        listeners: list[socket.socket],
    ) -> None:
        self._spec = spec
        self._directory = directory
        self._record = record
        self._record_fd = record_fd
        self._child = child
        self._wakes = wakes
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        self._poll = select.poll()
        for fd in (wakes.fd, *self._listeners):
            self._poll.register(fd, select.POLLIN)

        self._state = "prepared"
        self._begun_at_ns: int | None = None
        """When the workload was let run, Unix nanoseconds."""
        self._starting = False
        """It was let run, and is not known to run, or not to."""
        self._strangers: dict[int, int] = {}
        """Pid → status of children that were buried while the workload's own pid was not known."""
        self._run_until_ns: int | None = None
        self._main_status: int | None = None
        self._start_error: str | None = None
        self._cause: str | None = None
        self._kill_at_ns: int | None = None
        self._killing = False
        self._unasked = False
        """A stop was asked for while the workload's process was just being made, which could not hear it."""
        self._leftovers_due = False
        """The main process ended by itself and what it left behind was not asked to go yet."""
        self._kill_poll_ms = _KILL_POLL_MS[0]
        self._freezer = Freezer(spec.lease_id)
        self._freeze_poll_ms = _FREEZE_POLL_MS[0]
        self._ended: Outcome | None = None
        self._stored = False
        self._dropped = False
        """An agent was hung up on before it was told the end."""

    def run(self) -> None:
        """Guards until the whole tree is gone, then stores the outcome; :meth:`let_go` must follow, and tells it."""
        while not self._over():
            for fd, _ in self._poll.poll(self._act()):
                if fd == self._wakes.fd:
                    self._wakes.drain()
                elif fd in self._listeners:
                    self._accept(self._listeners[fd])
                elif fd in self._clients:
                    self._read_client(fd)
        self._store()

    def _over(self) -> bool:
        """Buries the dead. Returns whether nothing of the workload runs, or will."""
        # In this order: what was heard to have started was there before the dead are counted.
        self._hear_child()
        childless = self._reap()
        if self._begun_at_ns is None:
            return childless and self._kill_at_ns is not None
        return childless and not self._starting

    # -- time and death ----------------------------------------------------

    def _act(self) -> int:
        """Does what is due and returns for how many milliseconds nothing else is."""
        self.keep_log()
        now_ns = boottime_ns()
        on_lost, grace_ns = self._spec.on_lost, self._spec.grace_ns
        if self._begun_at_ns is None and on_lost != STOP:
            # What has not begun cannot be kept, or go on; and nothing of it needs time to tidy up.
            on_lost, grace_ns = STOP, 0
        verdict = judge(
            now_ns=now_ns,
            deadline_ns=self._record.deadline_ns(),
            grace_ns=grace_ns,
            run_until_ns=self._run_until_ns,
            kill_at_ns=self._kill_at_ns,
            on_lost=on_lost,
            frozen=self._freezer.frozen,
            # There is nothing to gather while it is being started.
            gathered=self._freezer.gathered or self._starting,
        )
        if verdict.step is Step.KILL or self._killing:
            self._begin_stop(verdict.cause, verdict.kill_at_ns)
            self._kill()
            poll_ms, self._kill_poll_ms = self._kill_poll_ms, min(self._kill_poll_ms * 2, _KILL_POLL_MS[1])
            return poll_ms
        if verdict.step is Step.STOP:
            self._begin_stop(verdict.cause, verdict.kill_at_ns)
            self._terminate()
        elif verdict.step is Step.GATHER:
            self._freezer.gather()
            return 0
        elif verdict.step is Step.THAW:
            return self._thaw()
        elif verdict.step is Step.FREEZE or self._freezer.frozen:
            return min(self._freeze(), max(0, verdict.wake_at_ns - now_ns) // NS_PER_MS + 1)
        return min(_MAX_POLL_MS, max(0, verdict.wake_at_ns - now_ns) // NS_PER_MS + 1)

    def _begin_stop(self, cause: str | None, kill_at_ns: int) -> None:
        """Notes a stop; the first cause counts, and a workload that ended by itself needs none."""
        if self._cause is None and self._main_status is None:
            self._cause = cause
        if self._kill_at_ns is None:
            self._kill_at_ns = kill_at_ns
            if self._starting:
                self._child.revoke()
            try:
                os.close(self._directory.open_file("cancel", os.O_WRONLY | os.O_CREAT, 0o644))
            except OSError:
                # The signal still says it; the file is the same word for those who do not listen to signals.
                self._log("could not make the cancel file")

    def _terminate(self) -> None:
        tree = self._tree()
        terminate(tree)
        self._unasked = self._starting and not tree

    def _kill(self) -> None:
        self._killing = True
        freeze_and_kill(self._tree)

    def _freeze(self) -> int:
        """Has the tree stand still, or sees to it that it does; returns when to look again, in milliseconds."""
        if self._starting:
            self._child.revoke()
            if self._child.outcome() is REVOKED:
                # There is nothing that could stand still, and it may not begin without the lease.
                self._begin_stop(LEASE_LOST, boottime_ns())
                return 0
        begins = not self._freezer.frozen
        began_ns = boottime_ns()
        stillness = self._freezer.freeze()
        now_ns = boottime_ns()
        if begins:
            self._freeze_poll_ms = _FREEZE_POLL_MS[0]
            self._tell_all()
        if stillness is Stillness.STILL and not self._starting:
            return max(_MAX_POLL_MS, _STILL_REST * (now_ns - began_ns) // NS_PER_MS)
        if stillness is Stillness.GROWS:
            if now_ns >= self._record.deadline_ns():
                # It cannot be had to stand still, and may not run on.
                self._log("the tree makes processes faster than they can be stopped: it is killed")
                self._begin_stop(LEASE_LOST, now_ns)
            return 0
        poll_ms, self._freeze_poll_ms = self._freeze_poll_ms, min(self._freeze_poll_ms * 2, _FREEZE_POLL_MS[1])
        return poll_ms

    def _thaw(self) -> int:
        """Has the tree go on; returns when to act again: at once, for the deadline is looked at after a thaw, too."""
        try:
            self._freezer.thaw()
        except OSError as error:
            self._log(f"could not thaw, trying again: {error}")
            return _THAW_AGAIN_MS
        self._tell_all()
        return 0

    def _tree(self) -> list[Process]:
        return [p for p in below(all_processes(), [os.getpid()]) if p.alive]

    def _reap(self) -> bool:
        """Returns whether the whole tree is gone: a subreaper without children has no descendants."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                if self._leftovers_due:
                    # Only now: looking through all processes of a host costs more than most jobs' ends.
                    self._leftovers_due = False
                    terminate(self._tree())
                return False
            if pid == self._child.pid:
                self._main_ended(status)
            elif self._starting:
                self._strangers[pid] = status

    def _main_ended(self, status: int) -> None:
        self._main_status = status
        if self._begun_at_ns is None and self._kill_at_ns is None:
            self._start_error = "the workload's process was killed before it began"
        self._hear_child()
        if self._kill_at_ns is None:
            self._kill_at_ns = boottime_ns() + min(self._spec.grace_ns, LEFTOVER_GRACE_NS)
            # SIGTERM comes with SIGCONT: what stands still is killed as it stands.
            self._leftovers_due = not self._freezer.frozen

    # -- the workload's start ----------------------------------------------

    def _begin(self) -> None:
        if self._begun_at_ns is not None or self._kill_at_ns is not None:
            return
        # The deadline is looked at on the near side of exec, however late the agent's word came.
        self._act()
        if self._kill_at_ns is not None:
            return
        self._begun_at_ns = time.time_ns()
        self._record.note_begun(self._begun_at_ns)
        self._starting = True
        if self._child.ready_fd is not None:
            self._poll.register(self._child.ready_fd, select.POLLIN)
        try:
            self._child.begin()
        except OSError as error:
            self._starting = False
            self._start_error = f"cannot begin in {self._spec.directory}: {error.strerror}"
            self._kill_at_ns = boottime_ns()
            return
        if self._spec.run_timeout_ns is not None:
            self._run_until_ns = boottime_ns() + self._spec.run_timeout_ns

    def _hear_child(self) -> None:
        if not self._starting or not (outcome := self._child.outcome()):
            return
        self._starting = False
        if self._child.ready_fd is not None:
            self._poll.unregister(self._child.ready_fd)
        self._child.close()
        if isinstance(outcome, Failure):
            self._start_failed(outcome)
            return
        self._state = "running"
        self._tell_all()
        if self._unasked:
            self._terminate()
        if self._child.pid in self._strangers:
            self._main_ended(self._strangers[self._child.pid])

    def _start_failed(self, failure: Failure) -> None:
        self._start_error = describe_failure(failure, self._spec)
        if failure is REVOKED and self._cause is None:
            # By :meth:`_freeze`, amid an attempt to start it that then failed.
            self._cause = LEASE_LOST
        if failure.of_host and self._cause is None:
            # No fault of the job: another host, or another time, may have what it takes.
            self._log(self._start_error)
            self._cause = KEEPER_DIED

    # -- the agent ---------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            # It hung up meanwhile, or there is no descriptor left for it; the guard itself needs none.
            return
        if peer(connection)[1] not in (0, os.geteuid()):
            connection.close()
            return
        connection.setblocking(False)
        self._clients[connection.fileno()] = (connection, bytearray())
        self._poll.register(connection.fileno(), select.POLLIN)
        self._tell(connection, self._status(None))

    def _read_client(self, fd: int) -> None:
        connection, inbox = self._clients[fd]
        try:
            data = connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data or len(inbox) > _MAX_LINE_BYTES:
            self._drop(connection)
            return
        inbox += data
        while (end := inbox.find(b"\n")) >= 0:
            line = bytes(inbox[:end])
            del inbox[: end + 1]
            try:
                self._serve(json.loads(line))
            except (ValueError, KeyError, TypeError):
                self._log(f"an order that is none: {line[:200]!r}")

    def _serve(self, order: dict[str, object]) -> None:
        if order["op"] == "begin":
            self._begin()
        elif order["op"] == "stop":
            self._stop(str(order["cause"]), order["grace_ms"])
        else:
            raise ValueError(order["op"])

    def _stop(self, cause: str, grace_ms: object) -> None:
        grace_ns = self._spec.grace_ns if grace_ms is None else int(str(grace_ms)) * NS_PER_MS
        if self._freezer.frozen:
            # By now the server may have said that it goes on; then it is asked as any other.
            self._act()
        if self._freezer.frozen:
            grace_ns = 0
        kill_at_ns = boottime_ns() + max(0, grace_ns)
        if self._kill_at_ns is not None:
            if self._cause is None and self._main_status is None:
                self._cause = cause
            self._kill_at_ns = min(self._kill_at_ns, kill_at_ns)
            return
        if self._begun_at_ns is None:
            # Nothing of the job runs, so nothing needs time to tidy up.
            kill_at_ns = 0
        self._begin_stop(cause, kill_at_ns)
        if grace_ns > 0 and self._begun_at_ns is not None:
            self._terminate()

    def _status(self, outcome: Outcome | None) -> bytes:
        status = {
            "state": "ended" if outcome else self._state,
            "frozen": self._freezer.frozen,
            "pid": self._child.pid,
            "started_at_ns": self._begun_at_ns,
            "record_fd": self._record_fd,
            "outcome": outcome.to_json() if outcome else None,
        }
        return json.dumps(status).encode() + b"\n"

    def _tell_all(self, outcome: Outcome | None = None) -> None:
        for connection, _ in list(self._clients.values()):
            self._tell(connection, self._status(outcome))

    def _tell(self, connection: socket.socket, status: bytes) -> None:
        try:
            connection.sendall(status)
        except OSError:
            # An agent that does not read, or is gone: it will find the outcome in its file.
            self._dropped = True
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._poll.unregister(connection.fileno())
        del self._clients[connection.fileno()]
        connection.close()

    # -- the end -----------------------------------------------------------

    def _store(self) -> None:
        for listener in self._listeners.values():
            self._accept(listener)
        self._ended = self._outcome()
        try:
            self._directory.write_outcome(self._ended)
            self._stored = True
        except OSError as error:
            self._log(f"the outcome could not be stored, it is only told: {error}")

    def let_go(self) -> bool:
        """Lets go of the lease, then tells how it ended. Returns whether this process may guard another.

        It may if somebody was told, and can find it: whoever waits for a keeper
        whose word he never had waits for its exit. And only if nothing of it was
        of another user, or is still about to be started.
        """
        deleted = self._directory.deleted
        # From here on it is no keeper of this lease, to whoever looks for one to kill.
        set_title(LEAVING_TITLE)
        for listener in self._listeners.values():
            listener.close()
        self._wakes.drain()
        self._record.close()
        os.close(self._record_fd)
        self._child.close()
        self._freezer.close()
        self.keep_log()
        self._directory.close()
        # Whoever hears this, or its end of file, may count on the lock being free.
        if self._ended is not None:
            self._tell_all(self._ended)
        told = bool(self._clients)
        for connection, _ in self._clients.values():
            connection.close()
        usual = isinstance(self._child, SpawnedChild) and self._child.outcome() is not REVOKED
        return told and usual and self._stored and not self._dropped and not deleted

    def keep_log(self) -> None:
        """Moves what this process has said of itself into ``keeper.log``, made only for that."""
        if not os.lseek(2, 0, os.SEEK_CUR):
            return
        said = os.pread(2, _READ_BYTES, 0)
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        try:
            fd = self._directory.open_file("keeper.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError:
            # Nobody could find it.
            return
        try:
            os.write(fd, said)
        except OSError:
            # A full disk. What is not said costs less than a guard that dies of it.
            return
        finally:
            os.close(fd)

    def _outcome(self) -> Outcome:
        exit_code, signum = None, 0
        ran = self._begun_at_ns is not None and self._start_error is None
        if ran and self._main_status is not None:
            code = os.waitstatus_to_exitcode(self._main_status)
            exit_code, signum = (code, 0) if code >= 0 else (None, -code)
        return Outcome(
            lease_id=self._spec.lease_id,
            exit_code=exit_code,
            signal=signum,
            stop_cause=self._cause,
            start_error=None if self._cause is not None and not ran else self._start_error,
            started_at_ns=self._begun_at_ns if ran else None,
            ended_at_ns=time.time_ns(),
        )

    def _log(self, text: str) -> None:
        os.write(2, f"lease {self._spec.lease_id}: {text}\n".encode(errors="replace"))
