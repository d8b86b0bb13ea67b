"""The limit of the host: a program spawned and waited for, in each way that Python has, and nothing else.

``python -m benchmarks.plain_spawn JOBS`` prints what it did as JSON: how it was done → programs per second.
In a process of its own: a large one is slower to spawn from, and all children are waited for.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time

PROGRAM = "/bin/true"

LOOPS = ("a posix_spawn loop", "asyncio.create_subprocess_exec")
"""What a program would do that has to start others: the better of these is what "plain spawn" means."""


def measure(jobs: int) -> dict[str, float]:
    """Returns how it was done → programs per second, measured by a new process."""
    command = [sys.executable, "-m", __name__, str(jobs)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def one_by_one(jobs: int) -> float:
    """Spawns the program and waits for it, again and again. Returns programs per second."""
    began = time.perf_counter()
    for _ in range(jobs):
        os.waitpid(os.posix_spawn(PROGRAM, [PROGRAM], {}), 0)
    return jobs / (time.perf_counter() - began)


def several(jobs: int, at_once: int) -> float:
    """Spawns the program with ``at_once`` of them under way. Returns programs per second."""
    began = time.perf_counter()
    under_way = 0
    for _ in range(jobs):
        if under_way == at_once:
            os.wait()
            under_way -= 1
        os.posix_spawn(PROGRAM, [PROGRAM], {})
        under_way += 1
    for _ in range(under_way):
        os.wait()
    return jobs / (time.perf_counter() - began)


def by_asyncio(jobs: int, at_once: int) -> float:
    """Spawns the program as an asyncio program does. Returns programs per second."""

    async def spawn() -> None:
        todo = iter(range(jobs))

        async def one_after_another() -> None:
            for _ in todo:
                await (await asyncio.create_subprocess_exec(PROGRAM)).wait()

        await asyncio.gather(*(one_after_another() for _ in range(at_once)))

    began = time.perf_counter()
    asyncio.run(spawn())
    return jobs / (time.perf_counter() - began)


def main() -> None:
    """Measures every way and prints the figures."""
    jobs = int(sys.argv[1])
    at_once = 2 * (os.cpu_count() or 1)
    loop, asyncio_way = LOOPS
    found = {
        loop: one_by_one(jobs),
        asyncio_way: by_asyncio(jobs, at_once),
        f"posix_spawn, {at_once} at once": several(jobs, at_once),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
