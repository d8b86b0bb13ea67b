"""The process between a program and its Postgres: no server outlives who started it.

Run as a script, ``python guard.py PLAN``, with stdin a pipe that only the owner
holds. When the pipe closes (the owner asked, or is gone, even by SIGKILL) the
guard stops the server: fast, then immediate, then by force. When the guard dies,
the kernel sends the server the parent-death signal. That signal is not given to
the server for the owner itself, because it fires when the *thread* that forked
ends, and owners start servers from worker threads.

PLAN is JSON: ``argv``; ``log``, where the server's output goes; ``uid`` and
``gid`` (null: ours); ``lock_fd``, an open file whose lock lasts as long as we do;
``remove``, a directory to delete after a stop (null: none); ``stop_s``, seconds
to wait at each step of a stop. The first line of stdout is the server's pid.

It imports nothing but the standard library and starts without site-packages: it
is there in milliseconds and stays small.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from typing import Any

_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)
"""PostgreSQL's fast and immediate shutdown, then force."""


def main(plan: dict[str, Any]) -> int:
    """Runs the server until it ends or the owner lets go. Returns the server's exit status."""
    os.set_inheritable(plan["lock_fd"], False)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    server = _spawn(plan)
    os.write(1, f"{server}\n".encode())
    os.close(1)

    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(wake_read, select.POLLIN)
    steps = iter(_STOP_SIGNALS)
    stopping = False
    next_step: float | None = None
    while True:
        timeout_ms = None if next_step is None else max(0, round((next_step - time.monotonic()) * 1000))
        ready = {fd for fd, _ in poll.poll(timeout_ms)}
        asked = False
        if wake_read in ready:
            # Any signal but the child's asks us to stop.
            asked = any(number != signal.SIGCHLD for number in os.read(wake_read, 512))
        if 0 in ready and not os.read(0, 512):
            poll.unregister(0)
            asked = True
        pid, status = os.waitpid(server, os.WNOHANG)
        if pid:
            break
        if asked and not stopping:
            stopping = True
            _mark_stopping(plan["lock_fd"])
        due = next_step is not None and time.monotonic() >= next_step
        if (stopping and next_step is None) or due:
            step = next(steps, signal.SIGKILL)
            os.kill(server, step)
            next_step = time.monotonic() + plan["stop_s"]
    if stopping and plan["remove"]:
        shutil.rmtree(plan["remove"], ignore_errors=True)
    return os.waitstatus_to_exitcode(status)


def _mark_stopping(lock_fd: int) -> None:
    """Tells whoever wants the data directory next that waiting is worth it."""
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, json.dumps({"stopping": True}).encode(), 0)


def _spawn(plan: dict[str, Any]) -> int:
    # Made before the fork: the child only calls it.
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    log = os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    guard = os.getpid()
    server = os.fork()
    if server:
        os.close(log)
        os.close(null)
        return server
    try:
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir("/")
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        if plan["uid"] is not None:
            os.setgroups([])
            os.setgid(plan["gid"])
            os.setuid(plan["uid"])
        if prctl is not None:
            # After the change of user, which would clear it.
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)
        if os.getppid() == guard:
            os.execv(plan["argv"][0], plan["argv"])
    except BaseException as error:
        os.write(2, f"FATAL:  cannot run {plan['argv'][0]}: {error}\n".encode())
    finally:
        os._exit(127)


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.exit(code if code >= 0 else 128 - code)
