"""The job that chaos runs submit: it writes down what it does, where no fault reaches.

``python -I -S workload.py DIRECTORY PLAN`` writes ``DIRECTORY/<fencing token>.<role>``:
one line per fact, ``kind nanoseconds words…``, the instants on CLOCK_BOOTTIME, so that
all executions on one host can be compared. Roles are ``main`` and ``child0``, ``child1``, …

``start pid gpus attempt job``  it runs
``tick``                        it still runs
``try n``, ``out n``            it is about to have written, and has written, n bytes to standard output
``term``                        it was asked to stop
``end code``                    it ends by itself

PLAN is JSON: ``seconds``; ``lines`` to print; ``exits``, the exit code of each attempt, the
last one for all later; ``children`` to fork; ``linger`` seconds that they outlive the job;
``stubborn``: it ignores SIGTERM; ``gate``, a file without which it does not end, empty: none.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

TICK_S = 0.05
_LONG_EVERY = 41
_LONG_BYTES = 9000


def line(token: int, number: int) -> bytes:
    """Returns line ``number`` of what the execution of ``token`` prints."""
    length = _LONG_BYTES if number % _LONG_EVERY == _LONG_EVERY - 1 else (token + number * 37) % 120
    return f"{token} {number} {'x' * length}\n".encode()


def printed(token: int, lines: int) -> bytes:
    """Returns all that the execution of ``token`` prints, if it gets to the end."""
    return b"".join(line(token, number) for number in range(lines))


def now_ns() -> int:
    """Returns CLOCK_BOOTTIME."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Diary:
    """Facts, each one write, so that a kill leaves at most the last one out."""

    def __init__(self, directory: str, token: int, role: str) -> None:
        path = os.path.join(directory, f"{token}.{role}")
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(self, kind: str, *words: object) -> None:
        """Writes one fact down, with the present instant."""
        os.write(self._fd, " ".join(map(str, (kind, now_ns(), *words))).encode() + b"\n")


def asked_to_stop(pause_s: float) -> bool:
    """Sleeps; returns whether SIGTERM, which is blocked, has come since the last time."""
    select.select((), (), (), pause_s)
    # Not sigtimedwait, which says that a signal came when a process that was stopped goes on after its timeout.
    asked = signal.SIGTERM in signal.sigpending()
    if asked:
        signal.sigwait((signal.SIGTERM,))
    return asked


def paced(until_ns: int, gate: str = "") -> Iterator[bool]:
    """Yields every tick until then, and until ``gate`` is there: whether SIGTERM came meanwhile. At least once."""
    while True:
        left_s = (until_ns - now_ns()) / 1e9
        pause_s = TICK_S if gate and left_s <= 0 else max(0.0, min(TICK_S, left_s))
        yield asked_to_stop(pause_s)
        if now_ns() >= until_ns and (not gate or os.path.exists(gate)):
            return


def child(diary: Diary, until_ns: int, stubborn: bool) -> None:
    """Ticks in a session of its own: no signal to the group finds it."""
    os.setsid()
    diary.note("start", os.getpid(), "-", "-", "-")
    for asked in paced(until_ns):
        diary.note("tick")
        if asked and not stubborn:
            diary.note("term")
            return
    diary.note("end", 0)


def main(directory: str, plan: dict[str, Any]) -> int:
    """Runs the plan; returns the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    token, attempt = int(os.environ["LESSOR_FENCING_TOKEN"]), int(os.environ["LESSOR_ATTEMPT"])
    diary = Diary(directory, token, "main")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or "-"
    diary.note("start", os.getpid(), gpus, attempt, os.environ["LESSOR_JOB_ID"])
    until_ns = now_ns() + int(plan["seconds"] * 1e9)
    stubborn = bool(plan["stubborn"])
    for number in range(plan["children"]):
        if os.fork() == 0:
            child(Diary(directory, token, f"child{number}"), until_ns + int(plan["linger"] * 1e9), stubborn)
            os._exit(0)
    started_ns, lines, written, number = now_ns(), plan["lines"], 0, 0
    for asked in paced(until_ns, plan.get("gate", "")):
        diary.note("tick")
        if asked:
            diary.note("term")
            if not stubborn:
                return 128 + signal.SIGTERM
        share = min(1.0, (now_ns() - started_ns) / max(1, until_ns - started_ns))
        while number < lines * share:
            written = put(diary, line(token, number), written)
            number += 1
    code = int(plan["exits"][min(attempt, len(plan["exits"])) - 1])
    diary.note("end", code)
    return code


def put(diary: Diary, data: bytes, written: int) -> int:
    """Writes ``data`` to standard output and notes how far it came; a full disk is waited out, tick by tick."""
    diary.note("try", written + len(data))
    while data:
        try:
            count = os.write(1, data)
        except OSError:
            diary.note("tick")
            if asked_to_stop(TICK_S):
                diary.note("term")
                os._exit(128 + signal.SIGTERM)
            continue
        data, written = data[count:], written + count
        diary.note("out", written)
    return written


if __name__ == "__main__":
    os._exit(main(sys.argv[1], json.loads(sys.argv[2])))
