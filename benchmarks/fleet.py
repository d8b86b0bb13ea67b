"""Simulated agents: the agent's real protocol core on real gRPC streams, with a runtime that ends at once.

What is not real: nothing is executed, and the journal is memory. Every message to and from
the server is what an agent on a host would exchange for such jobs. As on a host, what one
message of the server leads to is one burst of the core: answered when there is no more to do.

Commands on standard input, answers on standard output, JSON lines:
    ``stats``   leases begun, ended and acked, heartbeat acks, memory
    ``begun``   job id → CLOCK_MONOTONIC nanoseconds at which its workload began
    ``reset``   forgets what was counted
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import uvloop
from google.protobuf.timestamp_pb2 import Timestamp

from benchmarks.report import percentile
from lessor import __version__, timing
from lessor.open_files import raise_open_files
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.boottime import boottime_ns
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import AgentCore, Loss, Profile, Restored
from lessor_agent.protocol.outcomes import Ending, timestamp
from lessor_agent.protocol.session import Link
from lessor_agent.runtimes.base import Exit, Handle
from lessor_agent.stream import GrpcStreams

LOG_LINE = b"one line of output, as long as most lines are\n"
HALFWAY = job_pb2.Progress(fraction=0.5, message="halfway")
HANDLE = Handle("process", 1, {})


class Tally:
    """What the agents of one process have seen."""

    def __init__(self) -> None:
        self.reset()
        self.up = 0
        self.all_up = asyncio.Event()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.began = 0
        self.begun_at: dict[str, int] = {}
        self.ended = 0
        self.first_ended_ns = 0
        self.last_ended_ns = 0
        self.heartbeats = 0
        self.heartbeat_acks_ms: list[float] = []
        self.welcomes = 0
        self.last_welcome_ns = 0
        self.streams_lost = 0
        self.last_begun_ns = 0


class SimulatedAgent:
    """One agent without a host."""

    def __init__(self, number: int, address: str, options: argparse.Namespace, tally: Tally) -> None:
        self._tally = tally
        self._hold = options.work == "hold"
        self._chatty = options.chatty
        self._trace = options.trace
        self._agents = options.agents
        name = f"simulated-{number:05d}"
        profile = Profile(
            agent_id=name,
            agent_name=name,
            version=__version__,
            host=pb.HostIdentity(hostname=name, boot_id="simulated", hardware_id=name),
            inventory=pb.Inventory(
                cpu_millis=options.slots * 1000,
                memory_bytes=options.slots << 30,
                gpus=[
                    pb.Gpu(uuid=f"GPU-{name}-{index}", index=index, model="Simulated 80GB", memory_bytes=80 << 30)
                    for index in range(options.gpus)
                ],
            ),
            runtimes=(pb.RuntimeInfo(name="process"),),
            heartbeat_interval=timedelta(seconds=options.heartbeat),
        )
        self._core = AgentCore(profile, Restored(), random.random)
        self._streams = GrpcStreams(address)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._sent_heartbeats: dict[int, int] = {}
        self._was_up = False
        self._perform: dict[type, Callable[[Any, int], None]] = {
            act.Journal: self._commit,
            act.Send: self._send,
            act.SendLog: self._read_log,
            act.Prepare: self._prepare,
            act.Begin: self._begin,
            act.Stop: self._stop,
            act.Renew: self._renew,
            act.Forget: self._forget,
            act.OpenStream: self._open,
            act.CloseStream: self._close,
            act.GiveUp: self._give_up,
        }
        self._chunks: list[pb.LogChunk] = []
        """Output read in this burst, for one message."""
        self._chunks_stream_id = 0
        self._chunk_time = Timestamp()
        self._success: Ending | None = None
        """How the jobs end that end in this burst."""
        self._core.hold()

    def start(self) -> None:
        """Connects."""
        self._burst(self._core.start(boottime_ns()))

    def stream_opened(self, stream_id: int) -> None:
        """See the stream listener."""
        self._burst(self._core.stream_opened(stream_id, boottime_ns()))

    def stream_message(self, stream_id: int, message: pb.ConnectResponse) -> None:
        """See the stream listener."""
        tally = self._tally
        if message.HasField("ack"):
            now_ns = boottime_ns()
            if (sent := self._sent_heartbeats.pop(message.ack.heartbeat_seq, None)) is not None:
                tally.heartbeat_acks_ms.append((now_ns - sent) / 1e6)
        elif message.HasField("welcome"):
            tally.welcomes += 1
            tally.last_welcome_ns = time.monotonic_ns()
            if not self._was_up:
                self._was_up = True
                tally.up += 1
                if tally.up == self._agents:
                    tally.all_up.set()
        self._burst(self._core.message(stream_id, message, boottime_ns()))

    def stream_lost(self, stream_id: int, loss: Loss) -> None:
        """See the stream listener."""
        self._tally.streams_lost += 1
        self._burst(self._core.stream_lost(stream_id, loss, boottime_ns()))

    def _burst(self, actions: Sequence[act.Action]) -> None:
        """Does what an input led to, and all that follows from that; sends when nothing is left to do."""
        core = self._core
        now_ns = boottime_ns()
        self._do(actions, now_ns)
        while True:
            while actions := core.work(now_ns):
                self._do(actions, now_ns)
            actions = core.release(now_ns)
            core.hold()
            if not actions:
                break
            self._do(actions, now_ns)
        self._success = None
        self._send_chunks()
        self._schedule(now_ns)

    def _do(self, actions: Sequence[act.Action], now_ns: int) -> None:
        perform = self._perform
        for action in actions:
            perform[type(action)](action, now_ns)

    def _schedule(self, now_ns: int) -> None:
        wakeup_ns = self._core.next_wakeup_ns()
        if wakeup_ns is None or (self._timer is not None and self._timer_ns <= wakeup_ns):
            # One that rings too early finds nothing to do, and is set again.
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ns = wakeup_ns
        self._timer = asyncio.get_running_loop().call_later(max(0.0, (wakeup_ns - now_ns) / 1e9), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._burst(self._core.tick(boottime_ns()))

    # ── actions ──────────────────────────────────────────────────────────────

    def _commit(self, action: act.Journal, now_ns: int) -> None:
        self._core.journal_committed(action.ticket, now_ns)

    def _send(self, action: act.Send, now_ns: int) -> None:
        # Output goes before the end that it belongs to.
        self._send_chunks()
        if action.urgent and action.message.HasField("heartbeat"):
            self._tally.heartbeats += 1
            self._sent_heartbeats[action.message.heartbeat.seq] = now_ns
        self._streams.send(action.stream_id, action.message, urgent=action.urgent)

    def _read_log(self, action: act.SendLog, now_ns: int) -> None:
        self._chunks_stream_id = action.stream_id
        self._chunks.append(
            pb.LogChunk(
                job_id=action.job_id,
                lease_id=action.lease_id,
                offset=action.offset,
                stream=job_pb2.LogStream.ValueType(action.stream),
                data=LOG_LINE[action.file_offset : action.file_offset + action.length],
                time=self._read_at(),
            )
        )

    def _send_chunks(self) -> None:
        if self._chunks:
            message = pb.ConnectRequest(log_chunks=pb.LogChunks(chunks=self._chunks))
            self._chunks = []
            self._streams.send(self._chunks_stream_id, message)

    def _prepare(self, action: act.Prepare, now_ns: int) -> None:
        self._core.prepared(action.lease_id, HANDLE, now_ns)

    def _begin(self, action: act.Begin, now_ns: int) -> None:
        core, tally, lease_id = self._core, self._tally, action.lease_id
        tally.began += 1
        tally.last_begun_ns = time.monotonic_ns()
        if self._trace and (lease := core.leases.get(lease_id)) is not None:
            tally.begun_at[lease.job_id] = tally.last_begun_ns
        success = self._success
        if success is None:
            success = self._success = _ending(stdout_bytes=len(LOG_LINE) if self._chatty else 0)
        assert success.exit is not None
        core.running(lease_id, success.exit.ended_at, now_ns)
        if self._hold:
            return
        if self._chatty:
            core.progress(lease_id, HALFWAY, now_ns)
        core.ended(lease_id, success, now_ns)

    def _stop(self, action: act.Stop, now_ns: int) -> None:
        self._core.ended(action.lease_id, _ending(stop_cause=action.cause), now_ns)

    def _renew(self, action: act.Renew, now_ns: int) -> None:
        """Nothing runs that could be late."""

    def _forget(self, action: act.Forget, now_ns: int) -> None:
        tally = self._tally
        tally.ended += 1
        tally.last_ended_ns = time.monotonic_ns()
        tally.first_ended_ns = tally.first_ended_ns or tally.last_ended_ns

    def _open(self, action: act.OpenStream, now_ns: int) -> None:
        self._streams.open(action.stream_id, self)

    def _close(self, action: act.CloseStream, now_ns: int) -> None:
        self._streams.close(action.stream_id)

    def _give_up(self, action: act.GiveUp, now_ns: int) -> None:
        raise RuntimeError(action.message)

    def _read_at(self) -> Timestamp:
        """When the output of this burst was read."""
        if not self._chunks:
            self._chunk_time = timestamp(datetime.now(UTC))
        return self._chunk_time

    @property
    def is_up(self) -> bool:
        """Its stream has a session."""
        return self._core.link is Link.UP


def _ending(*, stdout_bytes: int = 0, stop_cause: Any = None) -> Ending:
    now = datetime.now(UTC)
    code = None if stop_cause is not None else 0
    end = Exit(code, 0 if code == 0 else 15, stop_cause, start_error=None, started_at=now, ended_at=now)
    return Ending(end, stdout_bytes=stdout_bytes)


def _answer(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def _stats(tally: Tally, agents: Sequence[SimulatedAgent]) -> dict[str, Any]:
    acks = tally.heartbeat_acks_ms
    return {
        "began": tally.began,
        "ended": tally.ended,
        "first_ended_ns": tally.first_ended_ns,
        "last_ended_ns": tally.last_ended_ns,
        "last_begun_ns": tally.last_begun_ns,
        "heartbeats": tally.heartbeats,
        "heartbeat_acks": len(acks),
        "heartbeat_ack_p50_ms": percentile(acks, 0.5) if acks else None,
        "heartbeat_ack_p99_ms": percentile(acks, 0.99) if acks else None,
        "welcomes": tally.welcomes,
        "last_welcome_ns": tally.last_welcome_ns,
        "streams_lost": tally.streams_lost,
        "up": sum(agent.is_up for agent in agents),
        "leases": sum(len(agent._core.leases) for agent in agents),  # noqa: SLF001
        "rss_bytes": psutil.Process(os.getpid()).memory_info().rss,
    }


async def _serve(options: argparse.Namespace) -> None:
    tally = Tally()
    agents = [
        SimulatedAgent(options.first + number, options.address, options, tally) for number in range(options.agents)
    ]
    # Connected in waves: a backlog of ten thousand handshakes measures the host's listen queue.
    for number, agent in enumerate(agents):
        agent.start()
        if number % options.wave == options.wave - 1:
            while tally.up < number + 1 - options.wave:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    await tally.all_up.wait()
    # What ten thousand agents are made of stays: the collector need not go through it again and again.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    _answer("up", agents=len(agents))
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "stats":
            _answer("stats", **_stats(tally, agents))
        elif line == "begun":
            _answer("begun", at=tally.begun_at)
        elif line == "reset":
            tally.reset()
            _answer("reset")


def main() -> None:
    """Runs simulated agents until standard input ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--agents", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first one: names are made of numbers")
    parser.add_argument("--slots", type=int, default=10_000, help="one-CPU jobs that fit on an agent")
    parser.add_argument("--gpus", type=int, default=0, help="per agent")
    parser.add_argument(
        "--heartbeat", type=float, default=timing.DEFAULT_HEARTBEAT_INTERVAL.total_seconds(), help="seconds"
    )
    parser.add_argument("--work", choices=["instant", "hold"], default="instant", help="jobs end at once, or never")
    parser.add_argument("--chatty", action="store_true", help="one progress event and one log line per job")
    parser.add_argument("--trace", action="store_true", help="remember when each job began")
    parser.add_argument("--wave", type=int, default=200, help="connections under way at once")
    options = parser.parse_args(
        # `--chatty=True`, as all options are given by the benchmark.
        [argument.removesuffix("=True") for argument in sys.argv[1:] if not argument.endswith("=False")]
    )
    raise_open_files()
    uvloop.run(_serve(options))


if __name__ == "__main__":
    main()
