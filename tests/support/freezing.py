"""Jobs that write down when they ran, leases that are lost under them, and what tells that they stand still."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lessor_agent.boottime import NS_PER_MS, boot_id, boottime_ns
from lessor_agent.keeper.groups import groups_of
from lessor_agent.keeper.record import write_record
from lessor_agent.keeper.tree import is_stopped, offspring, read_process
from lessor_agent.runtimes.base import Execution, OnLost, StartRequest
from lessor_agent.runtimes.process import ProcessRuntime
from tests.support.cluster import until
from tests.support.process_runtime import keeper_of, python

TTL_NS = 1000 * NS_PER_MS
"""What is left of a lease that is about to be lost; a keeper that waits looks at its record every 500 ms."""
LATER_NS = 300 * NS_PER_MS
LATE_NS = 1000 * NS_PER_MS
"""So much later than its deadline a tree may stand still where the host itself stood: the server waits for it."""
LONG_NS = 60_000 * NS_PER_MS

# `tick(path)` appends the time to a file for ever, so that it tells when it ran; `fork_off` starts such a process in a
# session of its own whose parent is gone.
TICKING = """
import os, signal, sys, time
def now():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
def tick(path, computes=False):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        os.write(fd, b"%d\\n" % now())
        next_ns = now() + 2_000_000
        while computes and now() < next_ns:
            pass
        time.sleep(0 if computes else 0.002)
def fork_off(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            tick(path)
        os._exit(0)
    os.wait()
directory = sys.argv[1]
"""

# The main process, a child, a grandchild of another session, and one that computes without a pause.
FAMILY = f"""{TICKING}
fork_off(directory + "/grandchild")
if os.fork() == 0:
    tick(directory + "/child")
if os.fork() == 0:
    tick(directory + "/busy", computes=True)
tick(directory + "/main")
"""

# Deaf to no signal: tells on what it hears.
LISTENING = f"""{TICKING}
def heard(*_):
    open(directory + "/heard", "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, heard)
tick(directory + "/main")
"""

WAYS = {
    "v2": "freezer.make_group = lambda lease_id: groups.make_group(lease_id, (2,))",
    "v1": "freezer.make_group = lambda lease_id: groups.make_group(lease_id, (1,))",
    "signals": "freezer.make_group = lambda lease_id: None",
    "unmovable": "groups.Group.add = lambda *_: (_ for _ in ()).throw(PermissionError())",
    "unfreezable": "groups.Group.freeze = lambda *_: (_ for _ in ()).throw(PermissionError())",
}
"""How a keeper is made to freeze in one way only: a kind of control group, or stopping; the last two fail half-way."""


def of(script: str, ticks: Path, lease_id: int = 1, **changes: object) -> StartRequest:
    """Returns a request that runs ``script`` and is frozen when its lease is lost."""
    changes.setdefault("on_lost", OnLost.FREEZE)
    return python(lease_id, script, str(ticks), **changes)


def expire(execution: Execution, ttl_ns: int = TTL_NS) -> int:
    """Has the lease end after ``ttl_ns``, earlier than its record says; returns its deadline."""
    deadline_ns = boottime_ns() + ttl_ns
    with (execution.output.stdout.parent / "record").open("r+b") as record:
        write_record(record.fileno(), execution.lease_id, boot_id(), deadline_ns)
    return deadline_ns


class Freeze(NamedTuple):
    """A tree that stands still."""

    deadline_ns: int
    since_ns: int
    """When all of it was seen to; it is promised from the deadline on."""


Lose = Callable[[Execution], Awaitable[Freeze]]
"""Has a lease be lost, and returns once the keeper has said that its tree is frozen, and all of it is."""


def stands_still(execution: Execution) -> bool:
    """Returns whether all of its tree does, as the kernel says."""
    looks = [[process for process in offspring(keeper_of(execution)) if process.alive] for _ in range(2)]
    # What ran in between, or was born, may have left one that neither look has found.
    return looks[0] == looks[1] and all(
        is_stopped(process.pid) or any(group.stands_still() for group in groups_of([process.thread]))
        for process in looks[1]
    )


def times(path: Path) -> list[int]:
    """Returns when the processes that write into ``path`` ran, ascending."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return sorted(int(line) for line in lines)


def assert_still(ticks: Path, freeze: Freeze, to_ns: int | None = None) -> None:
    """Nothing ran from the deadline on; where the host itself stood, since it was seen to, or ``LATE_NS`` after."""
    from_ns = min(max(freeze.since_ns, freeze.deadline_ns), freeze.deadline_ns + LATE_NS)
    for path in ticks.iterdir():
        ran = [at - freeze.deadline_ns for at in times(path) if at > from_ns and (to_ns is None or at < to_ns)]
        assert not ran, f"{path.name} ran {ran[0] / 1e6} … {ran[-1] / 1e6} ms after its deadline"


async def passed(at_ns: int) -> None:
    """Returns once it is later than ``at_ns``."""
    await until(lambda: boottime_ns() > at_ns)


async def ticked(path: Path, since_ns: int = 0) -> None:
    """Returns once something that writes into ``path`` has run after ``since_ns``."""
    await until(lambda: any(at > since_ns for at in times(path)[-1:]))


async def begun(runtime: ProcessRuntime, request: StartRequest, ticks: Path, *names: str) -> Execution:
    """Starts it and returns once those of ``names``, or its main process, have run."""
    execution = await runtime.prepare(request)
    since_ns = boottime_ns()
    assert await execution.begin()
    for name in names or ("main",):
        await ticked(ticks / name, since_ns)
    return execution


def words_of(records: Iterable[logging.LogRecord]) -> list[str]:
    """Returns what keepers have said, in order, of trees that were frozen or thawed."""
    return [getattr(record, "event", "") for record in records if hasattr(record, "lease_id")]


def main_process(execution: Execution) -> int:
    """Returns the pid of the workload's first process."""
    with open(f"/proc/{keeper_of(execution)}/task/{keeper_of(execution)}/children") as file:
        return int(file.read().split()[0])


def state_of(pid: int) -> str:
    """Returns what a process that lives is doing, as ps shows it."""
    process = read_process(pid)
    assert process is not None
    return process.state
