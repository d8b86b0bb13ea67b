"""The zygote: forks keepers for one agent, and ends with it.

It is single-threaded and imports next to nothing, so a fork of it is cheap and
safe, which a fork of the agent would not be. It also catches what a keeper that
was killed leaves behind: being a subreaper, it becomes the parent of a dead
keeper's orphans, and kills them.

Protocol over the inherited socket, JSON lines. Agent: ``{"id", "op": "fork",
"spec"}`` and ``{"id", "op": "sweep"}``. Zygote: ``{"ready": pid}`` once, then
one answer per id: ``{"id", "pid"}``, ``{"id", "pid", "error", "taken"}`` or
``{"id", "swept": true}``.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import traceback
from typing import NoReturn

from lessor_agent.keeper import guard
from lessor_agent.keeper.kernel import become_subreaper
from lessor_agent.keeper.spec import KeeperSpec
from lessor_agent.keeper.tree import Process, all_processes, below, freeze_and_kill

_IDLE_POLL_MS = 60_000
_SWEEP_POLL_MS = (20, 1000)
"""Between two looks for orphans that live: at first, and at most, when one cannot be killed. A death wakes it too."""
_READ_BYTES = 1 << 16


class Zygote:
    """One zygote, and the agent it serves."""

    def __init__(self, agent: socket.socket) -> None:
        self._agent = agent
        self._inbox = bytearray()
        self._keepers: set[int] = set()
        self._births: dict[int, tuple[int, int, bytearray]] = {}
        """Readiness pipe → (request id, keeper's pid, what it said so far)."""
        self._sweeps: list[int] = []
        self._orphans_suspected = False
        self._sweep_poll_ms = _SWEEP_POLL_MS[0]
        self._poll = select.poll()
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        self._poll.register(self._wake_read, select.POLLIN)
        self._poll.register(agent.fileno(), select.POLLIN)

    def serve(self) -> None:
        """Answers the agent until it is gone."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._answer({"ready": os.getpid()})
        while True:
            busy = self._orphans_suspected or bool(self._sweeps)
            for fd, _ in self._poll.poll(self._sweep_poll_ms if busy else _IDLE_POLL_MS):
                if fd == self._wake_read:
                    _drain(fd)
                elif fd == self._agent.fileno():
                    if not self._read_agent():
                        return
                else:
                    self._read_birth(fd)
            self._reap()
            self._sweep()

    def _read_agent(self) -> bool:
        data = self._agent.recv(_READ_BYTES)
        if not data:
            return False
        if b"\n" not in data:
            self._inbox += data
            return True
        *lines, rest = bytes(self._inbox + data).split(b"\n")
        self._inbox = bytearray(rest)
        for line in lines:
            self._serve_request(json.loads(line))
        return True

    def _serve_request(self, request: dict[str, object]) -> None:
        number = int(str(request["id"]))
        if request["op"] == "sweep":
            self._sweeps.append(number)
            return
        spec = request["spec"]
        if not isinstance(spec, dict):
            raise TypeError("a fork request without a spec")
        try:
            read_fd, write_fd = os.pipe()
        except OSError as error:
            self._answer({"id": number, "error": f"cannot start a keeper: {error.strerror}"})
            return
        try:
            pid = os.fork()
        except OSError as error:
            os.close(read_fd)
            os.close(write_fd)
            self._answer({"id": number, "error": f"cannot start a keeper: {error.strerror}"})
            return
        if pid == 0:
            _become_keeper(KeeperSpec.from_json(spec), write_fd)
        os.close(write_fd)
        os.set_blocking(read_fd, False)
        self._keepers.add(pid)
        self._births[read_fd] = (number, pid, bytearray())
        self._poll.register(read_fd, select.POLLIN)

    def _read_birth(self, fd: int) -> None:
        number, pid, said = self._births[fd]
        data = os.read(fd, _READ_BYTES)
        if data:
            said += data
            return
        self._poll.unregister(fd)
        os.close(fd)
        del self._births[fd]
        report = json.loads(said) if said else {"error": "the keeper died before it was ready"}
        self._answer({"id": number, "pid": pid, **report})

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
        self._orphans_suspected = False
        for number in self._sweeps:
            self._answer({"id": number, "swept": True})
        self._sweeps.clear()

    def _answer(self, answer: dict[str, object]) -> None:
        self._agent.sendall(json.dumps(answer).encode() + b"\n")


def _become_keeper(spec: KeeperSpec, ready_fd: int) -> NoReturn:
    status = 70
    try:
        signal.set_wakeup_fd(-1)
        guard.keep(spec, ready_fd)
        status = 0
    except BaseException:
        # Into keeper.log, or as long as the keeper does not stand, to the agent's log.
        traceback.print_exc()
    finally:
        os._exit(status)


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 512):
            pass
    except BlockingIOError:
        return


def main(arguments: list[str]) -> NoReturn:
    """Runs the zygote; see ``__main__`` for its arguments."""
    agent = socket.socket(fileno=int(arguments[arguments.index("--socket") + 1]))
    agent.set_inheritable(False)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    become_subreaper()
    # Nothing here makes reference cycles, and pages the collector does not touch stay shared with every keeper.
    gc.disable()
    gc.freeze()
    try:
        Zygote(agent).serve()
    except (BrokenPipeError, ConnectionResetError):
        # The agent is gone; the keepers go on without either.
        os._exit(0)
    os._exit(0)
