"""What must hold after every step: the eight invariants of docs/lease-protocol.md, and liveness at the end."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from tests.simulation.agent import Agent
from tests.simulation.cluster import Cluster
from tests.simulation.host import Execution
from tests.simulation.network import Stream
from tests.simulation.scheduler import SECOND_NS, Scheduler, Violation
from tests.simulation.users import TTL, Users

_BY_THE_SERVER: frozenset[int] = frozenset({Outcome.LOST, Outcome.WITHDRAWN})
"""Outcomes that the server may write without the agent's word."""

_LOOK = """
SELECT json_build_object(
    'jobs', (SELECT json_agg(id) FROM job),
    'waiting', (SELECT json_agg(json_build_array(job_id, last_lease_id)) FROM (
        SELECT job_id, last_lease_id FROM ready UNION ALL SELECT job_id, last_lease_id FROM delayed) AS w),
    'leases', (SELECT json_agg(json_build_array(
        job_id, lease_id, agent_id, attempt, phase, outcome, final_log_offset, gpu_uuids)) FROM lease),
    'gpus', (SELECT json_agg(json_build_array(agent_id, gpu_uuid, lease_id)) FROM lease_gpu),
    'attempts', (SELECT json_agg(json_build_array(
        job_id, lease_id, attempt, outcome, failures, losses, final_state, log_bytes, logs_truncated_at, exit_code,
        agent_id) ORDER BY job_id, lease_id) FROM attempt)
)::text
"""
_CHUNKS = "SELECT lease_id, start_offset, stream, data FROM log_chunk ORDER BY lease_id, start_offset"


class _Lease(NamedTuple):
    job_id: int
    lease_id: int
    agent_id: str
    attempt: int
    phase: int
    outcome: int | None
    final_log_offset: int | None
    gpu_uuids: list[str]


class _Attempt(NamedTuple):
    job_id: int
    lease_id: int
    attempt: int
    outcome: int
    failures: int
    losses: int
    final_state: int | None
    log_bytes: int
    logs_truncated_at: int | None
    exit_code: int | None
    agent_id: str | None


@dataclass(slots=True)
class _State:
    """What is committed."""

    jobs: set[int]
    waiting: list[tuple[int, int | None]]
    leases: dict[int, _Lease]
    """By job."""
    gpus: list[tuple[str, str, int]]
    attempts: dict[tuple[int, int], _Attempt]
    """By job and lease."""
    finals: dict[int, _Attempt] = field(default_factory=dict)
    """By job."""


class Invariants:
    """Looks at the database and at the executions, and remembers what was promised."""

    def __init__(self, cluster: Cluster, scheduler: Scheduler, agents: Sequence[Agent], users: Users) -> None:
        self._cluster = cluster
        self._scheduler = scheduler
        self._agents = agents
        self._users = users
        self._told: dict[tuple[int, int], pb.LeaseEvent] = {}
        """(stream, seq) → event that reached a server."""
        self._outcomes: dict[int, set[int]] = defaultdict(set)
        """lease_id → outcomes that its agent told."""
        self._final_offsets: dict[int, set[int]] = defaultdict(set)
        self._acked: dict[tuple[int, int], int] = {}
        """(job, lease) → outcome of an end that was acked as recorded."""
        self._ends_acked: list[pb.LeaseEvent] = []
        self._expired: list[tuple[int, int]] = []
        self._finals: dict[int, _Attempt] = {}
        self._attempts: dict[tuple[int, int], _Attempt] = {}
        self._begun: dict[int, Execution] = {}
        self.looks = 0
        self.is_dirty = False
        """Something was committed since the last look."""

    # ── what is promised ─────────────────────────────────────────────────────

    def told(self, stream: Stream, message: pb.ConnectRequest) -> None:
        """Takes note of what an agent tells."""
        for event in message.lease_events.events:
            self._told[stream.number, event.seq] = event
            kind = event.WhichOneof("event")
            if kind == "ended":
                self._outcomes[event.lease_id].add(event.ended.outcome)
                self._final_offsets[event.lease_id].add(event.ended.final_log_offset)
            elif kind == "rejected":
                self._outcomes[event.lease_id].add(Outcome.REJECTED)

    def said(self, stream: Stream, message: pb.ConnectResponse) -> None:
        """Takes note of what a server says: an acked end is never lost, and finished work is not run again."""
        ended = [
            event
            for seq in message.ack.event_seqs
            if (event := self._told.get((stream.number, seq))) is not None
            and event.WhichOneof("event") == "ended"
            and event.ended.outcome not in _BY_THE_SERVER
        ]
        self._ends_acked += ended

    def _check_acks(self, state: _State) -> None:
        for event in self._ends_acked:
            outcome, lease_id = event.ended.outcome, event.lease_id
            lease = next((lease for lease in state.leases.values() if lease.lease_id == lease_id), None)
            attempt = next((a for (_, number), a in state.attempts.items() if number == lease_id), None)
            if lease is not None and lease.outcome is not None:
                self._acked[lease.job_id, lease_id] = lease.outcome
            elif attempt is not None and attempt.outcome not in _BY_THE_SERVER:
                self._acked[attempt.job_id, lease_id] = attempt.outcome
            elif lease is not None:
                self._broken(3, f"the end of lease {lease_id} was acked and is not recorded")
            elif any(last == lease_id for _, last in state.waiting):
                name = Outcome(outcome).name
                self._broken(3, f"lease {lease_id} ended as {name}; that was acked, and its job waits to run again")
        self._ends_acked.clear()

    def expired(self, rows: Sequence[Any]) -> None:
        """Leases have expired: their sessions were not renewed within the ttl, and the agent's deadline is past."""
        self._expired += [(row["session_id"], row["lease_id"]) for row in rows]

    def _check_expired(self) -> None:
        sessions = {
            row["id"]: row
            for row in self._cluster.look(
                "SELECT s.id, s.host_gone, s.renewed_at, l.clock FROM session AS s, leader AS l WHERE s.id = ANY($1)",
                [session for session, _ in self._expired],
            )
        }
        for session, lease_id in self._expired:
            row = sessions[session]
            if row["host_gone"]:
                continue
            since_ms = row["clock"] - row["renewed_at"]
            if since_ms < TTL / timedelta(milliseconds=1):
                self._broken(2, f"lease {lease_id} has expired {since_ms} ms after its session {session} was renewed")
            for agent in self._agents:
                execution = agent.host.executions.get(lease_id)
                if execution is not None and execution.exit is None:
                    left_ns = execution.deadline_ns - agent.host.local_ns()
                    if left_ns > 0:
                        self._broken(2, f"lease {lease_id} has expired {left_ns / SECOND_NS:.3f} s before its deadline")
        self._expired.clear()

    # ── executions ───────────────────────────────────────────────────────────

    def began(self, execution: Execution) -> None:
        """No two executions of a job overlap, no lease runs twice, and no GPU is used by two."""
        if execution.lease_id in self._begun:
            self._broken(2, f"lease {execution.lease_id} has begun twice")
        self._begun[execution.lease_id] = execution
        now = f"begins on {execution.agent}"
        self._scheduler.note(f"lease {execution.lease_id} of {execution.name} {now}")
        for other in self._begun.values():
            if other is execution or not other.lives:
                continue
            if other.job_id == execution.job_id and other.runs:
                self._broken(
                    2,
                    f"{execution.name}: lease {execution.lease_id} {now} while lease {other.lease_id} "
                    f"runs on {other.agent}",
                )
            both = set(other.gpu_uuids) & set(execution.gpu_uuids)
            if both:
                self._broken(6, f"leases {other.lease_id} and {execution.lease_id} use {sorted(both)} at once")

    def thawed(self, execution: Execution) -> None:
        """What was frozen goes on only as the latest of its job."""
        for other in self._begun.values():
            if other.job_id == execution.job_id and other.lease_id > execution.lease_id:
                self._broken(
                    2,
                    f"{execution.name}: lease {execution.lease_id} goes on on {execution.agent} after lease "
                    f"{other.lease_id} has begun on {other.agent}",
                )

    # ── the database ─────────────────────────────────────────────────────────

    def check(self) -> None:
        """Looks at what is committed, if anything was since the last look. To be called after each step."""
        if self.is_dirty or self._ends_acked:
            self.is_dirty = False
            state = self._look()
            self._check_acks(state)
            self._check(state)
        if self._expired:
            self._check_expired()

    def _look(self) -> _State:
        self.looks += 1
        (row,) = self._cluster.look(_LOOK)
        found = json.loads(row[0])
        leases = [_Lease(*row) for row in found["leases"] or ()]
        attempts = [_Attempt(*row) for row in found["attempts"] or ()]
        jobs = set(found["jobs"] or ())
        by_job = {lease.job_id: lease for lease in leases}
        if len(by_job) != len(leases):
            self._broken(1, "a job has two leases")
        state = _State(
            jobs,
            [(job, last) for job, last in found["waiting"] or ()],
            by_job,
            [(agent, gpu, lease) for agent, gpu, lease in found["gpus"] or ()],
            {(attempt.job_id, attempt.lease_id): attempt for attempt in attempts},
        )
        state.finals = {attempt.job_id: attempt for attempt in attempts if attempt.final_state is not None}
        return state

    def _check(self, state: _State) -> None:
        self._check_places(state)
        self._check_finals(state)
        self._check_attempts(state)
        self._check_gpus(state)
        self._check_promises(state)

    def _check_places(self, state: _State) -> None:
        places: dict[int, list[str]] = defaultdict(list)
        for job, _ in state.waiting:
            places[job].append("waiting")
        for job in state.leases:
            places[job].append("leased")
        for job in state.finals:
            places[job].append("ended")
        for job in state.jobs | places.keys():
            if len(places[job]) != 1 or job not in state.jobs:
                self._broken(5, f"job {job} is {' and '.join(places[job]) or 'nowhere'}")

    def _check_finals(self, state: _State) -> None:
        for job, before in self._finals.items():
            if state.finals.get(job) != before:
                self._broken(3, f"job {job} had ended as {before} and is now {state.finals.get(job)}")
        self._finals = state.finals

    def _check_attempts(self, state: _State) -> None:
        for key, before in self._attempts.items():
            now = state.attempts.get(key)
            taken_back = before.outcome in _BY_THE_SERVER and before.final_state is None
            if now != before and not taken_back:
                self._broken(3, f"attempt {before} has become {now}")
        changed = [attempt for key, attempt in state.attempts.items() if self._attempts.get(key) != attempt]
        for attempt in changed:
            self._check_attempt(attempt)
        for job in {attempt.job_id for attempt in changed}:
            self._check_budgets([attempt for (number, _), attempt in state.attempts.items() if number == job])
        self._attempts = state.attempts

    def _check_attempt(self, attempt: _Attempt) -> None:
        outcome, lease_id = Outcome(attempt.outcome), attempt.lease_id
        if lease_id == 0:
            return
        if outcome not in _BY_THE_SERVER and outcome not in self._outcomes[lease_id]:
            self._broken(3, f"lease {lease_id} ended as {outcome.name}, which its agent never said: {attempt}")
        if attempt.logs_truncated_at is None and outcome in (Outcome.SUCCEEDED, Outcome.FAILED):
            finals = self._final_offsets[lease_id]
            if attempt.log_bytes not in finals:
                self._broken(7, f"lease {lease_id} shows as ended with {attempt.log_bytes} log bytes of {finals}")

    def _check_budgets(self, attempts: list[_Attempt]) -> None:
        failures = losses = number = 0
        for attempt in attempts:
            if attempt.lease_id == 0:
                # It ended while it waited: no lease, so nothing to count.
                continue
            if attempt.attempt <= number:
                self._broken(3, f"tokens of a job do not grow with its attempts: {attempts}")
            number = attempt.attempt
            # One whose cancel was asked for costs nothing.
            cancelled = attempt.final_state == 6
            failures += attempt.outcome in (Outcome.FAILED, Outcome.TIMED_OUT) and not cancelled
            losses += attempt.outcome == Outcome.LOST and not cancelled
            if (attempt.failures, attempt.losses) != (failures, losses):
                self._broken(8, f"{failures} failures and {losses} losses were counted otherwise: {attempt}")

    def _check_gpus(self, state: _State) -> None:
        held = sorted((agent, gpu) for agent, gpu, _ in state.gpus)
        leased = sorted(
            (lease.agent_id, gpu)
            for lease in state.leases.values()
            if lease.phase < LeasePhase.DRAINING
            for gpu in lease.gpu_uuids
        )
        if held != leased:
            self._broken(6, f"leases hold {leased}, and taken are {held}")

    def _check_promises(self, state: _State) -> None:
        for request in self._users.requests:
            for job in request.numbers or ():
                if job not in state.jobs:
                    self._broken(4, f"job {job} of {request.request_id} was accepted and is gone")
        for (job, lease_id), outcome in self._acked.items():
            attempt, lease = state.attempts.get((job, lease_id)), state.leases.get(job)
            stands = attempt is not None and attempt.outcome == outcome
            drains = lease is not None and lease.lease_id == lease_id and lease.outcome == outcome
            if not stands and not drains:
                self._broken(3, f"lease {lease_id} was acked as {Outcome(outcome).name} and is now {attempt or lease}")

    # ── the end ──────────────────────────────────────────────────────────────

    def unfinished(self) -> str:
        """Returns what is still to be done before all is quiet; empty: nothing."""
        if not self._users.all_answered:
            return "a submit was never answered"
        alive = [execution.lease_id for execution in self._begun.values() if execution.lives]
        if alive:
            return f"leases {alive} still run"
        for agent in self._agents:
            core = agent.core
            if core is None:
                return f"{agent.process.name} is not there"
            if len(core.leases) or core.unacked_events:
                return f"{agent.process.name} holds {core.leases.ids()} and owes {core.unacked_events} events"
        state = self._look()
        open_jobs = sorted(state.jobs - state.finals.keys())
        if open_jobs or state.leases or state.gpus:
            return f"jobs {open_jobs} have not ended, leases {list(state.leases.values())} stand, {state.gpus} are held"
        return ""

    def check_logs(self) -> None:
        """The bytes of a log are those that were written, in order."""
        ends: dict[int, int] = defaultdict(int)
        per_stream: dict[tuple[int, int], int] = defaultdict(int)
        for row in self._cluster.look(_CHUNKS):
            lease_id, data, stream = row["lease_id"], row["data"], row["stream"]
            if row["start_offset"] != ends[lease_id]:
                self._broken(7, f"the log of lease {lease_id} has {ends[lease_id]} bytes before {row['start_offset']}")
            ends[lease_id] += len(data)
            at = per_stream[lease_id, stream]
            execution = self._begun.get(lease_id)
            if execution is None or data != execution.output(stream, at, len(data)):
                self._broken(7, f"lease {lease_id} never wrote what stands at {row['start_offset']} of its log")
            per_stream[lease_id, stream] += len(data)
        for (_, lease_id), attempt in self._attempts.items():
            if lease_id == 0 or attempt.logs_truncated_at is not None or attempt.outcome in _BY_THE_SERVER:
                # What the server gave up without the agent's word may get log bytes later.
                continue
            if attempt.log_bytes != ends[lease_id]:
                self._broken(7, f"lease {lease_id} says {attempt.log_bytes} log bytes, {ends[lease_id]} are there")

    def _broken(self, invariant: int, what: str) -> None:
        raise Violation(f"invariant {invariant} at {self._scheduler.now_ns / SECOND_NS:.3f} s: {what}")
