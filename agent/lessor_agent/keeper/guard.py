"""The keeper's own program: guards one lease from prepare to the end of its tree, then exits.

One thread, one poll loop. It is woken by the death of a child, by the agent, by
the workload's exec, and by the clock: at the next moment something is due, and
at least every 500 ms, because a poll does not count the time a host is
suspended and the deadline does.

Protocol on the control socket, JSON lines. Agent: ``{"op": "begin"}``,
``{"op": "stop", "cause", "grace_ms"}``. Keeper, at connect and at each change:
``{"state": "prepared" | "running" | "ended", "pid", "started_at_ns",
"record_fd", "outcome"}``. Several agents may be connected; each has equal say.

SIGTERM, SIGINT, SIGHUP, SIGQUIT and the job-control signals to the keeper itself are
ignored: stopping an agent's service must not stop its jobs. SIGKILL ends the
workload's main process with it; agent or zygote end the rest.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import time

from lessor_agent.boottime import NS_PER_MS, boottime_ns
from lessor_agent.keeper.child import Child, ChildRefused, describe_failure, fork_child
from lessor_agent.keeper.directory import Begun, LeaseDirectory, LockTaken, Outcome, listen_homeless, peer
from lessor_agent.keeper.kernel import become_subreaper, keeper_title, set_title
from lessor_agent.keeper.record import DeadlineRecord
from lessor_agent.keeper.spec import KeeperSpec
from lessor_agent.keeper.tree import Process, all_processes, below, freeze_and_kill, terminate
from lessor_agent.keeper.verdict import LEFTOVER_GRACE_NS, Step, judge

_MAX_POLL_MS = 500
_KILL_POLL_MS = (5, 200)
"""Between rounds of killing: at first, and at most, when something cannot die yet."""
_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 16
_IGNORED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGPIPE,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


def keep(spec: KeeperSpec, ready_fd: int) -> None:
    """Guards one lease. Returns when its tree is gone and its outcome is stored.

    Tells over ``ready_fd`` whether it stands (``{}``) or why not (``{"error",
    "taken"}``), once, and closes it.
    """
    try:
        keeper = _prepare(spec, ready_fd)
    except LockTaken as error:
        _report(ready_fd, {"error": str(error), "taken": True})
        return
    except FileNotFoundError as error:
        # Somebody else is removing the directory; whoever asked looks again.
        _report(ready_fd, {"error": f"{spec.directory}: {error.strerror}", "taken": True})
        return
    except ChildRefused as error:
        _report(ready_fd, {"error": str(error)})
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        _report(ready_fd, {"error": f"cannot prepare lease {spec.lease_id} in {spec.directory}: {reason}"})
        return
    _report(ready_fd, {})
    keeper.run()


def _report(fd: int, report: dict[str, object]) -> None:
    # The zygote may be gone with its agent; whoever comes next finds this keeper by its lock.
    with contextlib.suppress(BrokenPipeError):
        os.write(fd, json.dumps(report).encode())
    os.close(fd)


def _prepare(spec: KeeperSpec, ready_fd: int) -> Keeper:
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != ready_fd:
            try:
                os.close(int(name))
            except OSError:
                # The descriptor the listing itself used.
                continue
    gc.enable()
    os.setsid()
    os.umask(0o077)
    set_title(keeper_title(spec.lease_id, spec.state_dir), b"lessor-keeper")
    become_subreaper()
    directory = LeaseDirectory(spec.directory, spec.lease_id)
    try:
        return _take_guard(spec, directory)
    except BaseException:
        # The lock goes before the word does: whoever hears it may start over or clean up at once.
        directory.close()
        raise


def _take_guard(spec: KeeperSpec, directory: LeaseDirectory) -> Keeper:
    directory.lock()
    log = directory.open_file("keeper.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDWR)
    for source, target in ((null, 0), (null, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    os.chdir("/")
    directory.reserve_outcome()
    record_fd = directory.open_file("record", os.O_RDWR)
    record = DeadlineRecord(record_fd, spec.lease_id, spec.boot_id)
    wake_fd, write_fd = os.pipe()
    for fd in (wake_fd, write_fd):
        os.set_blocking(fd, False)
    child = fork_child(spec, directory)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    listeners = [directory.listen()]
    if (homeless := listen_homeless()) is not None:
        listeners.append(homeless)
    return Keeper(spec, directory, record, record_fd, child, wake_fd, listeners)


class Keeper:
    """One lease under guard."""

    def __init__(
        self,
        spec: KeeperSpec,
        directory: LeaseDirectory,
        record: DeadlineRecord,
        record_fd: int,
        child: Child,
        wake_fd: int,
        listeners: list[socket.socket],
    ) -> None:
        self._spec = spec
        self._directory = directory
        self._record = record
        self._record_fd = record_fd
        self._child = child
        self._report_fd: int | None = child.report_fd
        self._wake_fd = wake_fd
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        self._poll = select.poll()
        for fd in (wake_fd, child.report_fd, *self._listeners):
            self._poll.register(fd, select.POLLIN)

        self._state = "prepared"
        self._begun: Begun | None = None
        self._run_until_ns: int | None = None
        self._main_status: int | None = None
        self._start_error: str | None = None
        self._cause: str | None = None
        self._kill_at_ns: int | None = None
        self._killing = False
        self._leftovers_due = False
        """The main process ended by itself and what it left behind was not asked to go yet."""
        self._kill_poll_ms = _KILL_POLL_MS[0]

    def run(self) -> None:
        """Guards until the whole tree is gone, then stores and tells the outcome."""
        while not self._reap():
            for fd, _ in self._poll.poll(self._act()):
                if fd == self._wake_fd:
                    self._drain_wakes()
                elif fd == self._report_fd:
                    self._read_report()
                elif fd in self._listeners:
                    self._accept(self._listeners[fd])
                elif fd in self._clients:
                    self._read_client(fd)
        self._finish()

    # -- time and death ----------------------------------------------------

    def _act(self) -> int:
        """Does what is due and returns for how many milliseconds nothing else is."""
        now_ns = boottime_ns()
        verdict = judge(
            now_ns=now_ns,
            deadline_ns=self._record.deadline_ns(),
            grace_ns=self._spec.grace_ns,
            run_until_ns=self._run_until_ns,
            kill_at_ns=self._kill_at_ns,
        )
        if verdict.step is Step.KILL or self._killing:
            self._begin_stop(verdict.cause, verdict.kill_at_ns)
            self._kill()
            poll_ms, self._kill_poll_ms = self._kill_poll_ms, min(self._kill_poll_ms * 2, _KILL_POLL_MS[1])
            return poll_ms
        if verdict.step is Step.STOP:
            self._begin_stop(verdict.cause, verdict.kill_at_ns)
            terminate(self._tree())
        return min(_MAX_POLL_MS, max(0, verdict.wake_at_ns - now_ns) // NS_PER_MS + 1)

    def _begin_stop(self, cause: str | None, kill_at_ns: int) -> None:
        """Notes a stop; the first cause counts, and a workload that ended by itself needs none."""
        if self._cause is None and self._main_status is None:
            self._cause = cause
        if self._kill_at_ns is None:
            self._kill_at_ns = kill_at_ns
            try:
                os.close(self._directory.open_file("cancel", os.O_WRONLY | os.O_CREAT, 0o644))
            except OSError:
                # The signal still says it; the file is the same word for those who do not listen to signals.
                self._log("could not make the cancel file")

    def _kill(self) -> None:
        self._killing = True
        freeze_and_kill(self._tree)

    def _tree(self) -> list[Process]:
        return [p for p in below(all_processes(), [os.getpid()]) if p.alive]

    def _reap(self) -> bool:
        """Buries the dead. Returns whether the whole tree is gone: a subreaper without children has no descendants."""
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
                self._main_status = status
                self._main_ended()

    def _main_ended(self) -> None:
        if self._begun is None and self._kill_at_ns is None:
            self._start_error = "the workload's process was killed before it began"
        if self._report_fd is not None:
            self._read_report()
        if self._kill_at_ns is None:
            self._kill_at_ns = boottime_ns() + min(self._spec.grace_ns, LEFTOVER_GRACE_NS)
            self._leftovers_due = True

    # -- the workload's start ----------------------------------------------

    def _begin(self) -> None:
        if self._begun is not None or self._kill_at_ns is not None:
            return
        # The deadline is looked at on the near side of exec, however late the agent's word came.
        self._act()
        if self._kill_at_ns is not None:
            return
        begun = Begun(self._child.pid, time.time_ns())
        try:
            self._directory.write_begun(begun)
            os.write(self._child.begin_fd, b"B")
        except OSError as error:
            self._start_error = f"cannot begin in {self._spec.directory}: {error.strerror}"
            self._kill_at_ns = boottime_ns()
            return
        self._begun = begun
        os.close(self._child.begin_fd)
        if self._spec.run_timeout_ns is not None:
            self._run_until_ns = boottime_ns() + self._spec.run_timeout_ns

    def _read_report(self) -> None:
        assert self._report_fd is not None
        report = os.read(self._report_fd, _READ_BYTES)
        self._poll.unregister(self._report_fd)
        os.close(self._report_fd)
        self._report_fd = None
        if report:
            self._start_error = describe_failure(report, self._spec)
        elif self._begun is not None:
            self._state = "running"
            self._tell_all()

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
        kill_at_ns = boottime_ns() + max(0, grace_ns)
        if self._kill_at_ns is not None:
            if self._cause is None and self._main_status is None:
                self._cause = cause
            self._kill_at_ns = min(self._kill_at_ns, kill_at_ns)
            return
        if self._begun is None:
            # Nothing of the job runs, so nothing needs time to tidy up.
            kill_at_ns = 0
        self._begin_stop(cause, kill_at_ns)
        if grace_ns > 0 and self._begun is not None:
            terminate(self._tree())

    def _status(self, outcome: Outcome | None) -> bytes:
        status = {
            "state": "ended" if outcome else self._state,
            "pid": self._child.pid,
            "started_at_ns": self._begun.started_at_ns if self._begun else None,
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
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._poll.unregister(connection.fileno())
        del self._clients[connection.fileno()]
        connection.close()

    # -- the end -----------------------------------------------------------

    def _finish(self) -> None:
        for listener in self._listeners.values():
            self._accept(listener)
        outcome = self._outcome()
        try:
            self._directory.write_outcome(outcome)
        except OSError as error:
            self._log(f"the outcome could not be stored, it is only told: {error}")
        self._tell_all(outcome)

    def _outcome(self) -> Outcome:
        exit_code, signum = None, 0
        ran = self._begun is not None and self._start_error is None
        if ran and self._main_status is not None:
            code = os.waitstatus_to_exitcode(self._main_status)
            exit_code, signum = (code, 0) if code >= 0 else (None, -code)
        return Outcome(
            lease_id=self._spec.lease_id,
            exit_code=exit_code,
            signal=signum,
            stop_cause=self._cause,
            start_error=None if self._cause is not None and not ran else self._start_error,
            started_at_ns=self._begun.started_at_ns if ran and self._begun else None,
            ended_at_ns=time.time_ns(),
        )

    def _drain_wakes(self) -> None:
        try:
            while os.read(self._wake_fd, 512):
                pass
        except BlockingIOError:
            return

    def _log(self, text: str) -> None:
        os.write(2, f"lease {self._spec.lease_id}: {text}\n".encode(errors="replace"))
