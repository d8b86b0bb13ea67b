"""Watchers: many WatchJobs streams in a process of their own, and when each of them saw which job.

Commands on standard input, answers on standard output, JSON lines:
    ``watch [{"queue": …, "job_ids": […]}, …]``  opens one stream per item; answers when each has had its first response
    ``count``  changes and messages received so far, CPU seconds of this process
    ``seen STATE JOB …``  job → CLOCK_MONOTONIC nanoseconds at which each watcher heard of it in that state
    ``drop``  ends all streams
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import grpc
import uvloop

from lessor.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc

_CHANNELS = 8
_UP_TIMEOUT_S = 60.0


class Watchers:
    """The process, seen from the one that measures. A context: it ends with the block."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> Watchers:
        """Starts it, without any streams."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.watchers", f"--address={self._address}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        """Kills it."""
        self._process.kill()
        self._process.communicate()

    def watch(self, requests: Sequence[dict[str, Any]]) -> None:
        """Opens a stream per request (field → value) beside those that are open; returns once each was answered."""
        self._ask("watch", json.dumps(list(requests)))

    def count(self) -> tuple[int, int, float]:
        """Returns how many changes and how many messages came so far, and the CPU seconds that took the process."""
        answer = self._ask("count")
        return answer["changes"], answer["messages"], answer["cpu_s"]

    def seen(self, state: job_pb2.JobState.ValueType, job_ids: Sequence[str]) -> dict[str, list[int]]:
        """Returns job → when watchers heard that it was in that state (CLOCK_MONOTONIC, nanoseconds)."""
        found: dict[str, list[int]] = self._ask("seen", json.dumps([state, *job_ids]))["at"]
        return found

    def drop(self) -> None:
        """Ends all streams."""
        self._ask("drop")

    def _ask(self, command: str, argument: str = "null") -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command} {argument}\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the watchers ended while they were asked to {command}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Streams:
    """The streams of this process."""

    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(_CHANNELS)]
        self._stubs = [job_service_pb2_grpc.JobServiceStub(channel) for channel in channels]
        self._tasks: list[asyncio.Task[None]] = []
        self._seen: defaultdict[int, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.changes = 0
        self.messages = 0

    async def watch(self, requests: Sequence[dict[str, Any]]) -> None:
        answered = []
        for number, request in enumerate(requests):
            first = asyncio.get_running_loop().create_future()
            answered.append(first)
            stub = self._stubs[number % _CHANNELS]
            self._tasks.append(asyncio.create_task(self._follow(stub, request, first)))
        await asyncio.wait_for(asyncio.gather(*answered), _UP_TIMEOUT_S)

    async def _follow(self, stub: Any, request: dict[str, Any], first: asyncio.Future[None]) -> None:
        try:
            async for response in stub.WatchJobs(job_service_pb2.WatchJobsRequest(**request)):
                now_ns = time.monotonic_ns()
                self.messages += 1
                if not first.done():
                    # Where the jobs stand is no news of them.
                    first.set_result(None)
                    continue
                for change in response.changes:
                    self.changes += 1
                    self._seen[change.state][change.job_id].append(now_ns)
        except grpc.aio.AioRpcError as error:
            print(f"a watcher was cut off: {error.code()} {error.details()}", file=sys.stderr, flush=True)
            if not first.done():
                first.set_exception(error)

    def seen(self, state: int, job_ids: Sequence[str]) -> dict[str, list[int]]:
        return {job_id: self._seen[state][job_id] for job_id in job_ids}

    async def drop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._seen.clear()


async def _serve(address: str) -> None:
    streams = _Streams(address)
    reader = asyncio.StreamReader(limit=16 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        command, _, argument = line.partition(" ")
        answer: dict[str, Any] = {}
        match command:
            case "watch":
                await streams.watch(json.loads(argument))
            case "count":
                answer = {"changes": streams.changes, "messages": streams.messages, "cpu_s": time.process_time()}
            case "seen":
                state, *job_ids = json.loads(argument)
                answer = {"at": streams.seen(state, job_ids)}
            case "drop":
                await streams.drop()
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Watches until standard input ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--address", required=True)
    uvloop.run(_serve(parser.parse_args().address))


if __name__ == "__main__":
    main()
