"""Old agents go on with today's server, and today's agent with old servers: recordings, replayed both ways."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf import json_format

from lessor import timing
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2, job_service_pb2
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.outcomes import Ending
from lessor_agent.workload_events import EventReader
from tests.support.agent_core import MS_NS, CoreDriver, an_exit
from tests.support.conversation import (
    Conversation,
    Line,
    Names,
    agent_words,
    as_recorded,
    normalised,
    said_by_agents,
    server_words,
    translated,
)
from tests.support.servers import EOF, WAIT_S, Client, connected, running_server

pytestmark = pytest.mark.contract

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("v*/*.jsonl"))
every_recording = pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: f"{path.parent.name}-{path.stem}")


class AgentReplay:
    """Says what a recorded agent said, and hears today's server."""

    def __init__(self, client: Client, pool: asyncpg.Pool) -> None:
        self._client = client
        self._pool = pool
        self._names = Names()
        self._call: Any = None
        self.heard: list[tuple[Any, ...]] = []
        """All that the server said, in the recording's names."""

    async def take(self, line: Line) -> None:
        """Does, says or waits for what a line holds."""
        if line.happens is not None:
            await self._happens(line.happens)
        elif line.agent is not None:
            await self._call.write(translated(line.agent, self._names.live))
            if line.agent.HasField("goodbye"):
                await self._end()
        elif line.server is not None:
            for word in server_words(line.server):
                await self._until_heard(word)

    async def _happens(self, what: Mapping[str, Any]) -> None:
        match what:
            case {"connect": True}:
                self._call = self._client.agents.Connect()
            case {"cut": True}:
                self._call.cancel()
            case {"submit": spec, "job": name}:
                request = job_service_pb2.SubmitJobRequest(spec=json_format.ParseDict(spec, job_pb2.JobSpec()))
                self._names.bind("job", name, (await self._client.jobs.SubmitJob(request)).job_id)
            case {"cancel": name}:
                cancel = job_service_pb2.CancelJobsRequest(job_ids=[self._names.live("job", name)])
                await self._client.jobs.CancelJobs(cancel)
            case {"until": state, "job": name}:
                await self._client.until(self._names.live("job", name), job_pb2.JobState.Value(state))
            case {"lease_time_s": seconds}:
                by = timedelta(seconds=seconds) // timedelta(milliseconds=1)
                await self._pool.execute("UPDATE leader SET clock = clock + $1", by)
            case {"workload": _} | {"forget_state": True}:
                pass
            case _:
                raise AssertionError(f"the recording has an unknown happening: {what}")

    async def _until_heard(self, word: tuple[Any, ...]) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while not any(as_recorded(said, word) for said in self.heard):
                    await self._hear()
        except (TimeoutError, EOFError) as error:
            raise AssertionError(f"{word} was not said, only {self.heard}") from error

    async def _hear(self) -> None:
        message = await self._call.read()
        if message is EOF:
            raise EOFError
        self.heard += server_words(normalised(message, self._names))

    async def _end(self) -> None:
        """A goodbye ends the stream in order, after all that was still to be said."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    await self._hear()
        except EOFError:
            assert await self._call.code() is grpc.StatusCode.OK


@every_recording
async def test_a_recorded_agent_and_todays_server(path: Path, database_url: str, pool: asyncpg.Pool) -> None:
    conversation = Conversation.read(path)
    async with running_server(database_url) as server, connected(server) as client:
        replay = AgentReplay(client, pool)
        for line in conversation.lines:
            await replay.take(line)
    recorded = [word for line in conversation.lines if line.server is not None for word in server_words(line.server)]
    unexpected = [
        said for said in replay.heard if not any(as_recorded(said, word) or _is_ack(said) for word in recorded)
    ]
    assert not unexpected, "the server said what it did not say then"


def _is_ack(word: tuple[Any, ...]) -> bool:
    """Acks of heartbeats and logs are cumulative: how many there are on the way is chance."""
    return word[0] in ("heartbeat", "log")


class Host:
    """What a replayed agent runs on: executions that do what the recording says."""

    def __init__(self) -> None:
        self.events: dict[int, EventReader] = {}
        self.written: dict[int, tuple[int, int]] = {}
        """lease_id → bytes of standard output and standard error."""
        self.over: set[int] = set()


class ServerReplay:
    """Says what a recorded server said, and hears today's agent core."""

    def __init__(self) -> None:
        self._begin()
        self._said: list[tuple[Any, ...]] = []

    def _begin(self) -> None:
        self._driver = CoreDriver(heartbeat=timedelta(seconds=1))
        self._host = Host()
        self._may_open = False
        self._started = False

    def take(self, line: Line) -> None:
        """Does, says or waits for what a line holds."""
        if line.happens is not None:
            self._happens(line.happens)
        elif line.server is not None:
            self._driver.say(line.server)
        elif line.agent is not None:
            if line.agent.HasField("goodbye"):
                self._driver.do(self._driver.core.shutdown("recorded", self._driver.now_ns))
            for word in agent_words(line.agent):
                self._until_said(word)
        self._carry_out()

    def left_over(self) -> list[tuple[Any, ...]]:
        """Returns what the agent said beyond the recording, but for heartbeats."""
        return [word for word in self._said if word[0] != "heartbeat"]

    @property
    def driver(self) -> CoreDriver:
        """Today's core."""
        return self._driver

    def _happens(self, what: Mapping[str, Any]) -> None:
        match what:
            case {"connect": True}:
                if not self._started:
                    self._started = True
                    self._driver.do(self._driver.core.start(self._driver.now_ns))
                self._advance_until(lambda: self._may_open, "a stream was not opened")
                self._may_open = False
                self._driver.do(self._driver.core.stream_opened(self._driver.stream_id, self._driver.now_ns))
            case {"cut": True}:
                self._driver.lose()
            case {"forget_state": True}:
                self._begin()
            case {"workload": does, "lease_id": lease_id}:
                self._work(lease_id, does)
            case {"submit": _} | {"cancel": _} | {"until": _} | {"lease_time_s": _}:
                pass
            case _:
                raise AssertionError(f"the recording has an unknown happening: {what}")

    def _work(self, lease_id: int, does: Mapping[str, Any]) -> None:
        core, now_ns = self._driver.core, self._driver.now_ns
        events = self._host.events.setdefault(lease_id, EventReader(lease_id))
        out, err = self._host.written.get(lease_id, (0, 0))
        out, err = out + len(does.get("stdout", "").encode()), err + len(does.get("stderr", "").encode())
        if (out, err) != self._host.written.get(lease_id, (0, 0)):
            self._host.written[lease_id] = (out, err)
            self._driver.do(core.log_available(lease_id, out, err, now_ns))
        if "event" in does:
            news = events.feed(json.dumps(does["event"]).encode() + b"\n")
            if news.progress is not None:
                self._driver.do(core.progress(lease_id, news.progress, now_ns))
            if news.checkpoint is not None:
                self._driver.do(core.checkpoint(lease_id, news.checkpoint, now_ns))
        if "exit_code" in does:
            ending = Ending(an_exit(does["exit_code"]), events.result_json, events.error, out, err)
            self._driver.do(core.ended(lease_id, ending, now_ns))

    def _carry_out(self) -> None:
        """Does on the host what the core asks for, and what follows from it."""
        while self._driver.actions:
            actions = list(self._driver.actions)
            self._driver.clear()
            for action in actions:
                self._carry_out_one(action)

    def _carry_out_one(self, action: act.Action) -> None:
        match action:
            case act.Send():
                self._said += agent_words(action.message)
            case act.SendLog():
                stream = job_pb2.LogStream.Name(job_pb2.LogStream.ValueType(action.stream))
                self._said.append(("log", action.job_id, action.lease_id, action.offset, stream, action.length))
            case act.OpenStream():
                self._may_open = True
            case act.Prepare():
                self._driver.prepared(action.lease_id)
            case act.Begin():
                self._driver.running(action.lease_id)
            case act.Stop() if action.lease_id not in self._host.over:
                self._host.over.add(action.lease_id)
                out, err = self._host.written.get(action.lease_id, (0, 0))
                self._driver.ended(
                    action.lease_id, an_exit(None, signal=15, cause=action.cause), stdout=out, stderr=err
                )

    def _until_said(self, word: tuple[Any, ...]) -> None:
        self._advance_until(lambda: word in self._said, f"{word} was not said")
        self._said.remove(word)

    def _advance_until(self, condition: Any, what: str) -> None:
        """Lets at most ten seconds of the agent's time pass."""
        self._carry_out()
        for _ in range(200):
            if condition():
                return
            self._driver.advance(50 * MS_NS)
            self._carry_out()
        raise AssertionError(f"{what}, only {self._said}")


@every_recording
def test_a_recorded_server_and_todays_agent(path: Path) -> None:
    replay = ServerReplay()
    for line in Conversation.read(path).lines:
        replay.take(line)
    assert not replay.left_over(), "the agent said what it did not say then"
    assert not replay.driver.held()
    assert replay.driver.core.unacked_events == 0


@pytest.mark.parametrize("version", range(timing.MIN_PROTOCOL_VERSION, timing.PROTOCOL_VERSION + 1))
def test_every_version_that_is_spoken_is_recorded(version: int) -> None:
    talks = [Conversation.read(path) for path in RECORDINGS if path.parent.name == f"v{version}"]
    assert {talk.protocol_version for talk in talks} == {version}
    assert said_by_agents(talks) >= {
        *("hello", "heartbeat", "progress", "log", "goodbye"),
        *("accepted", "running", "checkpoint_saved", "ended", "released"),
    }
    server = [line.server for talk in talks for line in talk.lines if line.server is not None]
    decisions = {answer.decision for message in server for answer in message.welcome.leases}
    assert decisions >= {pb.LEASE_DECISION_KEEP, pb.LEASE_DECISION_STALE}
    reasons = {revoke.reason for message in server for revoke in message.revokes.revokes}
    assert reasons >= {pb.REVOKE_REASON_CANCELLED, pb.REVOKE_REASON_NOT_LISTED}


def test_a_recording_is_text_that_survives_reading(tmp_path: Path) -> None:
    for path in RECORDINGS:
        Conversation.read(path).write(tmp_path)
        assert (tmp_path / path.name).read_text() == path.read_text()
