"""The zygote: forks keepers for one agent, and ends with the last of them once that agent is gone.

It is single-threaded and imports next to nothing, so a fork of it is cheap and
safe, which a fork of the agent would not be. It also catches what a keeper that
was killed leaves behind: being a subreaper, it becomes the parent of a dead
keeper's orphans, and kills them. For this it outlives its agent.

A keeper whose lease is over waits a few seconds for another: most of what a
short job costs is the fork of its keeper, which copies every page that either
process then writes to. It guards one lease at a time, and exits when the zygote
lets go of it.

Protocol over the inherited socket, JSON lines. Agent: ``{"id", "op": "fork",
"spec", "own"}`` (the spec as a text, which only the keeper has to understand;
whether it is for a keeper of its own) and ``{"id", "op": "sweep"}``. Zygote: ``{"ready": pid}`` once, then
one answer per id: ``{"id", "pid"}``, ``{"id", "pid", "error", "taken"}`` or
``{"id", "swept": true}``.
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
import traceback
from typing import NoReturn

from lessor_agent.keeper import duty
from lessor_agent.keeper.child import IGNORED, reset_signals
from lessor_agent.keeper.groups import remove_abandoned
from lessor_agent.keeper.kernel import become_subreaper, title_room
from lessor_agent.keeper.spec import KeeperSpec
from lessor_agent.keeper.tree import Process, all_processes, below, freeze_and_kill
from lessor_agent.keeper.wakes import Wakes

_IDLE_POLL_MS = 60_000
_SWEEP_POLL_MS = (20, 1000)
"""Between two looks for orphans that live: at first, and at most, when one cannot be killed. A death wakes it too."""
_READ_BYTES = 1 << 16
_MAX_GIVEN_BYTES = 1 << 16
"""A larger spec is for a keeper of its own: it might not fit into the socket's buffer, and one that stands still
would hold up all others."""
_MAX_IDLE = 64
_IDLE_S = 5.0
"""An idle keeper is let go of after this long, and at once where there are :data:`_MAX_IDLE` others."""


class _Keeper:
    """A keeper, as the zygote knows it."""

    __slots__ = ("idle_since_s", "inbox", "pid", "request", "socket")

    def __init__(self, pid: int, connection: socket.socket, request: int) -> None:
        self.pid = pid
        self.socket = connection
        self.request: int | None = request
        """Id of the fork request it has not answered; None: it stands, or is idle."""
        self.inbox = bytearray()
        self.idle_since_s = 0.0


class Zygote:
    """One zygote, and the agent it serves."""

    def __init__(self, agent: socket.socket) -> None:
        self._agent: socket.socket | None = agent
        self._inbox = bytearray()
        self._keepers: set[int] = set()
        """Pids of those that were not buried."""
        self._connected: dict[int, _Keeper] = {}
        """Descriptor → keeper."""
        self._idle: list[_Keeper] = []
        """Those that would take a lease, the one that has waited longest first."""
        self._sweeps: list[int] = []
        self._orphans_suspected = False
        self._sweep_poll_ms = _SWEEP_POLL_MS[0]
        self._poll = select.poll()
        self._wakes = Wakes()
        self._poll.register(self._wakes.fd, select.POLLIN)
        self._poll.register(agent.fileno(), select.POLLIN)

    def serve(self) -> None:
        """Answers the agent until it is gone, and buries its keepers until none is left."""
        self._answer({"ready": os.getpid()})
        while self._agent is not None or self._keepers or self._orphans_suspected:
            ready = {fd for fd, _ in self._poll.poll(self._poll_ms())}
            if self._wakes.fd in ready:
                self._wakes.drain()
            for fd in ready:
                if (keeper := self._connected.get(fd)) is not None:
                    self._read_keeper(keeper)
            # After the keepers: one that has just become idle is there to be given what is asked for now.
            if self._agent is not None and self._agent.fileno() in ready:
                self._read_agent(self._agent)
            self._reap()
            self._sweep()
            self._let_go_of_idle()

    def _poll_ms(self) -> int:
        if self._orphans_suspected or self._sweeps:
            return self._sweep_poll_ms
        if self._idle:
            return max(0, round(1000 * (self._idle[0].idle_since_s + _IDLE_S - time.monotonic()))) + 1
        return _IDLE_POLL_MS

    def _read_agent(self, agent: socket.socket) -> None:
        try:
            data = agent.recv(_READ_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            self._outlive(agent)
            return
        if b"\n" not in data:
            self._inbox += data
            return
        *lines, rest = bytes(self._inbox + data).split(b"\n")
        self._inbox = bytearray(rest)
        for line in lines:
            self._serve_request(json.loads(line))

    def _outlive(self, agent: socket.socket) -> None:
        """Goes on without the agent: keepers that guard nothing leave, the others when they do not any more."""
        self._poll.unregister(agent.fileno())
        agent.close()
        self._agent = None
        self._sweeps.clear()
        for keeper in list(self._connected.values()):
            self._drop(keeper)
        # What it was told on was the agent's; its end of file there says that all is settled.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def _serve_request(self, request: dict[str, object]) -> None:
        number = int(str(request["id"]))
        if request["op"] == "sweep":
            self._sweeps.append(number)
            return
        spec = str(request["spec"])
        if request["own"] or not self._give(number, spec):
            self._fork(number, spec)

    def _give(self, number: int, spec: str) -> bool:
        """Has an idle keeper guard a lease; returns False if there is none."""
        line = spec.encode() + b"\n"
        if len(line) > _MAX_GIVEN_BYTES:
            return False
        while self._idle:
            # The one that was busy last: its memory is at hand, and the others get to leave.
            keeper = self._idle.pop()
            try:
                if keeper.socket.send(line, socket.MSG_DONTWAIT) < len(line):
                    raise BlockingIOError
            except OSError:
                # It was killed, or stands still.
                self._drop(keeper)
                continue
            keeper.request = number
            return True
        return False

    def _fork(self, number: int, spec: str) -> None:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._answer({"id": number, "error": f"cannot start a keeper: {error.strerror}"})
            return
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            self._answer({"id": number, "error": f"cannot start a keeper: {error.strerror}"})
            return
        if pid == 0:
            _become_keeper(spec, theirs)
        theirs.close()
        self._keepers.add(pid)
        self._connected[ours.fileno()] = _Keeper(pid, ours, number)
        self._poll.register(ours.fileno(), select.POLLIN)

    def _read_keeper(self, keeper: _Keeper) -> None:
        try:
            data = keeper.socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # What the poll told was about one that had this descriptor before.
            return
        except ConnectionError:
            data = b""
        if not data:
            self._drop(keeper)
            return
        keeper.inbox += data
        while (end := keeper.inbox.find(b"\n")) >= 0:
            report = json.loads(keeper.inbox[:end])
            del keeper.inbox[: end + 1]
            if "idle" in report:
                keeper.idle_since_s = time.monotonic()
                self._idle.append(keeper)
            elif keeper.request is not None:
                number, keeper.request = keeper.request, None
                self._answer({"id": number, "pid": keeper.pid, **report})

    def _drop(self, keeper: _Keeper) -> None:
        """Hangs up on a keeper: it is gone, or exits once it guards nothing."""
        if keeper in self._idle:
            self._idle.remove(keeper)
        self._poll.unregister(keeper.socket.fileno())
        del self._connected[keeper.socket.fileno()]
        keeper.socket.close()
        if keeper.request is not None:
            error = "the keeper died before it was ready"
            self._answer({"id": keeper.request, "pid": keeper.pid, "error": error})

    def _let_go_of_idle(self) -> None:
        limit_s = time.monotonic() - _IDLE_S
        while self._idle and (self._idle[0].idle_since_s <= limit_s or len(self._idle) > _MAX_IDLE):
            self._drop(self._idle[0])

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._keepers:
                self._keepers.discard(pid)
                # A keeper that ended as it should has proved its tree gone.
                self._orphans_suspected |= status != 0

    def _orphans(self) -> list[Process]:
        table = all_processes()
        own = os.getpid()
        roots = [p.pid for p in table.values() if p.parent == own and p.pid not in self._keepers]
        # A root is a child that only the zygote reaps: a dead one is not gone before _reap saw it.
        return [table[pid] for pid in roots] + [p for p in below(table, roots) if p.alive]

    def _sweep(self) -> None:
        if not self._orphans_suspected and not self._sweeps:
            return
        freeze_and_kill(self._orphans)
        self._reap()
        if self._orphans():
            self._sweep_poll_ms = min(self._sweep_poll_ms * 2, _SWEEP_POLL_MS[1])
            return
        self._sweep_poll_ms = _SWEEP_POLL_MS[0]
        if self._orphans_suspected:
            remove_abandoned()
        self._orphans_suspected = False
        for number in self._sweeps:
            self._answer({"id": number, "swept": True})
        self._sweeps.clear()

    def _answer(self, answer: dict[str, object]) -> None:
        # One that is gone is read as such as well.
        if self._agent is not None:
            with contextlib.suppress(ConnectionError):
                self._agent.sendall(json.dumps(answer).encode() + b"\n")


def _become_keeper(spec: str, zygote: socket.socket) -> NoReturn:
    status = 70
    try:
        signal.set_wakeup_fd(-1)
        duty.keep(KeeperSpec.from_text(spec), zygote)
        status = 0
    except BaseException:
        # Into keeper.log, or as long as the keeper does not stand, to the agent's log.
        traceback.print_exc()
    finally:
        os._exit(status)


def main(arguments: list[str]) -> NoReturn:
    """Runs the zygote; see ``__main__`` for its arguments."""
    agent = socket.socket(fileno=int(arguments[arguments.index("--socket") + 1]))
    agent.set_inheritable(False)
    # What the agent was started with is not the jobs' concern, and what stops its service must not stop the zygote.
    reset_signals()
    for signum in IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    become_subreaper()
    # Looked up before any fork.
    title_room()
    # Nothing here makes reference cycles, and pages the collector does not touch stay shared with every keeper.
    gc.disable()
    gc.freeze()
    Zygote(agent).serve()
    os._exit(0)
