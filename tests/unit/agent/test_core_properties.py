"""Whatever happens in whatever order: no second begin, no begin after a release, every grant answered."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.session import Link
from lessor_agent.runtimes.base import StopCause
from tests.support.agent_core import SECOND_NS, CoreDriver, an_exit, its_end_is_known, keep, stale

LEASES = st.integers(min_value=1, max_value=4)
FINAL = {"released", "rejected", "ended"}


class AgentMachine(RuleBasedStateMachine):
    """A core between a server, a journal and a host that all do as they please."""

    def __init__(self) -> None:
        """Begins connected, with a journal that commits when it is told."""
        super().__init__()
        self.drive = CoreDriver()
        self.drive.commits = False
        self.drive.connect()
        self.seen = 0
        self.begun: list[int] = []
        self.standing: set[int] = set()
        """lease_ids whose execution stands."""
        self.preparing: set[int] = set()
        self.final: dict[int, str] = {}
        """lease_id → the final event that was sent first."""
        self.told: set[int] = set()
        """Numbers of the events sent."""
        self.granted: set[int] = set()
        self.stale: set[int] = set()
        self.renewed: dict[int, int] = {}

    # ── the server ───────────────────────────────────────────────────────────

    @rule(lease_id=LEASES, old=st.booleans())
    def grant(self, lease_id: int, old: bool) -> None:
        epoch = self.drive.epoch - 1 if old else self.drive.epoch
        if not old and self.drive.core.link is Link.UP:
            self.granted.add(lease_id)
        self.drive.grant(lease_id, epoch=epoch)

    @rule(lease_id=LEASES, reason=st.sampled_from([1, 2, 3, 4, 5]))
    def revoke(self, lease_id: int, reason: pb.RevokeReason.ValueType) -> None:
        if self.drive.core.link is Link.UP and reason == pb.REVOKE_REASON_STALE:
            self.stale.add(lease_id)
        self.drive.revoke(lease_id, reason)

    @rule()
    def ack_everything(self) -> None:
        if self.drive.core.link is Link.UP:
            self.drive.ack_events()

    @rule(decisions=st.lists(st.sampled_from([keep, keep, stale, its_end_is_known]), min_size=8, max_size=8))
    def reconnect(self, decisions: list[object]) -> None:
        drive = self.drive
        drive.lose()
        drive.advance(10 * SECOND_NS)
        drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
        answers = []
        for lease_id, decide in zip(drive.held(), decisions, strict=False):
            answers.append(decide(lease_id))  # type: ignore[operator]
            if decide is not keep:
                self.stale.add(lease_id)
        drive.welcome(*answers)

    @rule(seconds=st.integers(min_value=1, max_value=6))
    def time_passes(self, seconds: int) -> None:
        self.drive.advance(seconds * SECOND_NS)
        self.drive.ack(heartbeat=int(self.drive.core.link is Link.UP))
        if self.drive.core.link is not Link.UP:
            self.reconnect([keep] * 8)

    # ── the journal ──────────────────────────────────────────────────────────

    @rule()
    def commit(self) -> None:
        self.drive.commit()

    @rule()
    def fail(self) -> None:
        self.drive.fail_journal()

    # ── the host ─────────────────────────────────────────────────────────────

    @rule(lease_id=LEASES, refuse=st.booleans())
    def prepare(self, lease_id: int, refuse: bool) -> None:
        self.look()
        if lease_id not in self.preparing:
            return
        self.preparing.discard(lease_id)
        if refuse:
            self.drive.do(self.drive.core.prepare_refused(lease_id, job_pb2.JobError(type="NO"), self.drive.now_ns))
        else:
            self.standing.add(lease_id)
            self.drive.prepared(lease_id)

    @rule(lease_id=LEASES)
    def run(self, lease_id: int) -> None:
        self.look()
        if lease_id in self.begun and lease_id in self.standing:
            self.drive.running(lease_id)

    @rule(lease_id=LEASES, cause=st.sampled_from([None, StopCause.CANCELLED, StopCause.LEASE_LOST]))
    def end(self, lease_id: int, cause: StopCause | None) -> None:
        if lease_id in self.standing:
            self.standing.discard(lease_id)
            self.drive.ended(lease_id, an_exit(1, cause=cause))

    # ── what must hold ───────────────────────────────────────────────────────

    def look(self) -> None:
        """Takes in the actions since the last look."""
        for action in self.drive.actions[self.seen :]:
            if isinstance(action, act.Begin):
                assert action.lease_id not in self.begun, "begun twice"
                assert action.lease_id not in self.final, "begun after it was given back"
                assert action.lease_id in self.standing
                self.begun.append(action.lease_id)
            elif isinstance(action, act.Prepare):
                assert action.lease_id not in self.final
                assert action.lease_id not in self.preparing
                self.preparing.add(action.lease_id)
            elif isinstance(action, act.Renew):
                assert action.deadline_ns >= self.renewed.get(action.lease_id, 0), "a deadline moved back"
                self.renewed[action.lease_id] = action.deadline_ns
            elif isinstance(action, act.Send):
                for event in action.message.lease_events.events:
                    if event.seq in self.told:
                        # The same event, repeated until it is acked.
                        continue
                    self.told.add(event.seq)
                    kind = event.WhichOneof("event") or ""
                    first = self.final.get(event.lease_id)
                    if kind in FINAL:
                        self.final.setdefault(event.lease_id, kind)
                        # Released may follow: a repeated grant or revoke of what is over.
                        assert first in (None, kind) or kind == "released", f"{first}, then {kind}"
                    elif first is not None and event.lease_id not in self.stale:
                        raise AssertionError(f"{kind} after {first}")
        self.seen = len(self.drive.actions)

    @invariant()
    def holds(self) -> None:
        self.look()

    def teardown(self) -> None:
        """Lets everything come to rest: then every grant has its answer."""
        drive = self.drive
        for _ in range(3):
            drive.commit()
            self.look()
            for lease_id in sorted(self.preparing):
                self.prepare(lease_id, False)
            drive.commit()
            self.look()
        if drive.core.link is not Link.UP:
            self.reconnect([keep] * 8)
        drive.commit()
        self.look()
        stops = {action.lease_id for action in drive.of(act.Stop)}
        for lease_id in sorted(stops & self.standing):
            self.end(lease_id, StopCause.CANCELLED)
        drive.commit()
        self.look()
        told = {event.lease_id for event in drive.seen_events}
        assert self.granted - told - self.stale == set(), "a grant without an answer"


AgentMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestAgent = pytest.mark.unit(AgentMachine.TestCase)
