"""The leases an agent holds: what starts, stops, answers and forgets them.

Every grant and every revoke is answered, exactly by what is so: Accepted,
Rejected, Running, Ended or Released. A lease_id begins at most once in the life
of an agent, and never after it was released, rejected or forgotten: each of
those leaves a tombstone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime, timedelta

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol import outcomes, told
from lessor_agent.protocol.actions import (
    Begin,
    DropEvents,
    DropLease,
    Forget,
    Prepare,
    PutHandle,
    PutLease,
    PutPhase,
    Renew,
    Stop,
)
from lessor_agent.protocol.desk import Desk
from lessor_agent.protocol.handover import Handover
from lessor_agent.protocol.lease import (
    ACCEPTED,
    ENDED,
    INTENT,
    PREPARING,
    RUNNING,
    SECURING,
    Fate,
    Lease,
    RestoredLease,
    StopRequest,
    duration,
)
from lessor_agent.protocol.logflow import LeaseLog, Position, position_of
from lessor_agent.protocol.logwindow import LogWindow
from lessor_agent.protocol.progress import LatestProgress
from lessor_agent.protocol.restoring import take_up
from lessor_agent.protocol.session import Link, Session
from lessor_agent.protocol.unheld import Unheld
from lessor_agent.runtimes.base import Handle, StopCause

log = logging.getLogger(__name__)

_STOPPING = {
    pb.REVOKE_REASON_CANCELLED: StopCause.CANCELLED,
    pb.REVOKE_REASON_START_TIMEOUT: StopCause.START_TIMEOUT,
}


class LeaseTable:
    """Everything held, and the rules of docs/lease-protocol.md on the agent's side."""

    def __init__(
        self,
        desk: Desk,
        session: Session,
        runtimes: Collection[str],
        restored: Iterable[RestoredLease],
        tombstones: Iterable[int],
        undecided: Iterable[int] = (),
    ) -> None:
        """Begins with what a restarted agent found.

        Args:
            desk: Where actions go.
            session: Whose renewals count.
            runtimes: Names of the runtimes that can start jobs here.
            restored: Journalled leases; see :meth:`settle_restored`.
            tombstones: lease_ids that are never started, oldest first.
            undecided: lease_ids that are not held and of which something may still run: nothing is said of
                them until :meth:`decided`.
        """
        self._desk = desk
        self._session = session
        self._runtimes = frozenset(runtimes)
        self._held: dict[int, Lease] = {}
        self._unheld = Unheld(desk, tombstones, undecided)
        self._handover = Handover()
        self._restored = tuple(restored)
        self._begun: dict[int, Lease] = {}
        """Leases that run since the last :meth:`settle_begun`."""
        self.progress = LatestProgress()
        """Progress that waits to be sent."""
        self.logs = LogWindow()
        """Log bytes that wait and those under way."""

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def get(self, lease_id: int) -> Lease | None:
        """Returns a held lease."""
        return self._held.get(lease_id)

    def ids(self) -> list[int]:
        """Returns the ids of all held leases, ascending."""
        return sorted(self._held)

    # ── a restarted agent ────────────────────────────────────────────────────

    def settle_restored(self, now_ns: int) -> None:
        """Takes up the journalled leases: goes on, reports an end, or gives back."""
        for found in self._restored:
            if found.fate is Fate.NEVER_PREPARED and self._unheld.is_undecided(found.grant.lease_id):
                self._unheld.release(found.grant.job_id, found.grant.lease_id, "")
                continue
            lease = self._held[found.grant.lease_id] = take_up(found, self._desk.events)
            if found.fate is Fate.NEVER_PREPARED:
                self._give_back(lease, "the agent restarted before it was prepared")
            elif lease.end_acked and found.fate is not Fate.FOUND:
                # Its end is committed, its files are gone: there is nothing left to tell.
                self._forget(lease)
            elif lease.stage is not ENDED and found.fate is not Fate.FOUND:
                self.ended(
                    lease.lease_id, outcomes.Ending(exit=None, rebooted=found.fate is Fate.REBOOTED), now_ns=now_ns
                )
        self._restored = ()

    # ── what the server says ─────────────────────────────────────────────────

    def granted(self, grant: pb.Grant, now_ns: int) -> None:
        """Starts a lease, or answers again what is so of one already known."""
        lease_id = grant.lease_id
        if lease_id <= 0:
            log.error("grant without a lease id ignored", extra={"event": "grant_invalid", "job_id": grant.job_id})
        elif (lease := self._held.get(lease_id)) is not None:
            self._granted_again(lease, now_ns)
        elif lease_id in self._unheld:
            self._unheld.release(grant.job_id, lease_id, "the agent has given it back before")
        else:
            if log.isEnabledFor(logging.INFO):
                log.info("lease granted", extra={"event": "granted", "lease_id": lease_id, "job_id": grant.job_id})
            self._start(grant)

    def revoked(self, revoke: pb.Revoke, now_ns: int) -> None:
        """Answers a lease that is asked back, unless it :attr:`Lease.owes_an_end` and is said to be over."""
        lease = self._held.get(revoke.lease_id)
        reason = (
            pb.RevokeReason.Name(revoke.reason) if revoke.reason in pb.RevokeReason.values() else str(revoke.reason)
        )
        log.info(
            "lease asked back",
            extra={"event": "revoked", "lease_id": revoke.lease_id, "job_id": revoke.job_id, "reason": reason},
        )
        if lease is None:
            if revoke.reason == pb.REVOKE_REASON_STALE:
                self._unheld.drop(revoke.lease_id)
            else:
                self._unheld.release(revoke.job_id, revoke.lease_id, "the agent does not hold it")
        elif revoke.reason == pb.REVOKE_REASON_STALE:
            if not lease.owes_an_end:
                self._make_stale(lease)
        elif (cause := _STOPPING.get(revoke.reason)) is not None:
            self._stop(lease, cause, duration(revoke.grace) if revoke.HasField("grace") else None)
        elif revoke.reason == pb.REVOKE_REASON_OFFER_EXPIRED and lease.stage < SECURING:
            if not lease.abandoned:
                lease.withdrawn = "the offer expired before it was accepted"
                self._look_again(lease)
        else:
            self._say_again(lease)

    def answered(self, answers: Iterable[pb.LeaseAnswer], now_ns: int) -> None:
        """Takes the server's answers to a Hello, one per held lease, but for one that :attr:`Lease.owes_an_end`."""
        self.pause_logs()
        for held in self._held.values():
            held.confirmed = False
        for answer in answers:
            if (lease := self._held.get(answer.lease_id)) is None:
                continue
            if answer.decision == pb.LEASE_DECISION_STALE or (
                answer.decision == pb.LEASE_DECISION_ENDED and lease.stage is not ENDED
            ):
                if not lease.owes_an_end:
                    self._make_stale(lease)
                continue
            if answer.decision == pb.LEASE_DECISION_ENDED:
                lease.end_acked = True
                self._desk.drop(self._desk.events.remove_lease(lease.lease_id))
            elif answer.decision != pb.LEASE_DECISION_KEEP:
                log.error("unknown answer for a lease ignored", extra={"event": "answer", "lease_id": lease.lease_id})
                continue
            elif lease.stage is ENDED and lease.end_acked:
                # The server has lost an end that it had acked: tell it again.
                lease.end_acked = False
                self._say_again(lease)
            lease.confirmed = not lease.stale
            self._resume_log(lease, answer, now_ns)
            self._begin_restored(lease)
            self._forget_if_done(lease)
        for held in self._held.values():
            if not held.confirmed and not held.stale:
                log.warning(
                    "the server did not answer for a held lease; it is not renewed",
                    extra={"event": "unanswered", "lease_id": held.lease_id, "job_id": held.job_id},
                )

    def renew_all(self) -> None:
        """Moves the deadline of every execution that the session keeps."""
        for lease in self._held.values():
            self._renew(lease)

    def pause_logs(self) -> None:
        """No log flows until the server says again where each one stands."""
        self.logs.pause(lease.log for lease in self._held.values())

    def events_acked(self, seqs: Iterable[int]) -> None:
        """Takes acks of durable events."""
        acked = []
        for seq in seqs:
            if (pending := self._desk.events.remove(seq)) is None:
                continue
            acked.append(seq)
            lease = self._held.get(pending.lease_id)
            if lease is None:
                continue
            if seq == lease.checkpoint_seq:
                lease.checkpoint_seq = 0
            if pending.kind == "ended":
                lease.end_acked = True
                self._forget_if_done(lease)
        self._desk.drop(acked)

    def log_acked(self, message: pb.LogPosition, now_ns: int) -> None:
        """Takes a committed log position."""
        lease = self._held.get(message.lease_id)
        if lease is None or not lease.log.is_open:
            return
        position = position_of(message)
        if position is None:
            log.error("contradictory log position ignored", extra={"event": "log_ack", "lease_id": message.lease_id})
            return
        lease.log.acknowledge(position, now_ns)
        self.logs.moved(lease.lease_id, lease.log)
        self._forget_if_done(lease)

    # ── what happens on the host ─────────────────────────────────────────────

    def prepared(self, lease_id: int, handle: Handle) -> None:
        """The keeper of a lease stands."""
        lease = self._held.get(lease_id)
        if lease is None or lease.stage is not PREPARING:
            return
        if lease.abandoned:
            self._desk.put(Stop(lease_id, StopCause.STALE, None))
            return
        if lease.stop is not None:
            self._desk.put(Stop(lease_id, lease.stop.cause, lease.stop.grace))
            return
        lease.stage = SECURING
        self._renew(lease)
        self._desk.record(PutHandle(lease_id, handle), PutPhase(lease_id, LeasePhase.ACCEPTED))
        lease.accepted_seq = self._desk.tell(told.accepted(lease), "accepted").seq
        self._desk.after_commit(self._secured, lease)

    def prepare_refused(self, lease_id: int, error: job_pb2.JobError) -> None:
        """The runtime cannot start it; nothing of it is left."""
        lease = self._held.get(lease_id)
        if lease is None or lease.stage is not PREPARING:
            return
        if lease.stale:
            self._forget(lease)
        elif lease.withdrawn is not None:
            self._give_back(lease, lease.withdrawn)
        else:
            self._reject(lease, error)

    def running(self, lease_id: int, start_time: datetime) -> None:
        """The workload runs."""
        lease = self._held.get(lease_id)
        if lease is None or lease.stage is not ACCEPTED:
            return
        lease.stage = RUNNING
        lease.start_time = start_time
        if lease.stale:
            return
        if log.isEnabledFor(logging.INFO):
            log.info("job runs", extra={"event": "running", "lease_id": lease_id, "job_id": lease.job_id})
        self._begun[lease_id] = lease

    def settle_begun(self) -> None:
        """Journals that workloads run, once per burst: one that has ended by now has its end to tell, and no more."""
        for lease in self._begun.values():
            if lease.stage is RUNNING and not lease.stale:
                self._desk.record(PutPhase(lease.lease_id, LeasePhase.RUNNING))
                self._desk.tell(told.running(lease), "running")
        self._begun.clear()

    def ended(self, lease_id: int, ending: outcomes.Ending, now_ns: int) -> None:
        """The whole tree of an execution is gone."""
        lease = self._held.get(lease_id)
        if lease is None or (lease.stage is ENDED and lease.log.final_offset is not None):
            return
        if lease.stale:
            self._forget(lease)
        elif lease.withdrawn is not None:
            self._give_back(lease, lease.withdrawn)
        elif lease.rejected is not None:
            self._reject(lease, lease.rejected)
        else:
            self.progress.hurry(lease)
            self._grow(lease, ending.stdout_bytes, ending.stderr_bytes)
            # A file that shrank counts with its former length, in the flow and here.
            grown = lease.log.available
            event = pb.LeaseEvent(job_id=lease.job_id, lease_id=lease_id)
            ended = event.ended
            outcomes.write_ended(ended, ending, grown.offset)
            if lease.start_time is not None and (ending.exit is None or ending.exit.started_at is None):
                # Running may never have been sent: what it would have said is said here.
                ended.start_time.CopyFrom(outcomes.timestamp(lease.start_time))
            if lease.end_acked:
                lease.ended_event = ended
                lease.log.final_offset = grown.offset
                self._forget_if_done(lease)
            else:
                self._end(lease, event)

    def decided(self, lease_id: int) -> None:
        """Nothing runs of this lease any more: what was asked about it can be answered."""
        self._unheld.decide(lease_id)

    def checkpoint(self, lease_id: int, cursor: str) -> None:
        """The workload saved a checkpoint; only the newest one counts."""
        lease = self._held.get(lease_id)
        if lease is None or lease.stage is ENDED or lease.abandoned:
            return
        cursor = outcomes.clip(cursor, outcomes.MAX_CURSOR_BYTES)
        pending = self._desk.events.get(lease.checkpoint_seq)
        if pending is not None and not pending.committed:
            lease.checkpoint_next = cursor
            return
        self._put_checkpoint(lease, cursor)

    def log_available(self, lease_id: int, stdout_bytes: int, stderr_bytes: int) -> None:
        """The output files have grown to these sizes."""
        lease = self._held.get(lease_id)
        if lease is None or lease.abandoned:
            return
        if lease.log.final_offset is None or lease.restored:
            self._grow(lease, stdout_bytes, stderr_bytes)

    def progressed(self, lease_id: int, progress: job_pb2.Progress, now_ns: int) -> None:
        """The workload told its latest progress."""
        lease = self._held.get(lease_id)
        if lease is not None and not lease.abandoned:
            self.progress.put(lease, progress, now_ns)

    # ── one lease ────────────────────────────────────────────────────────────

    def _start(self, grant: pb.Grant) -> None:
        lease = Lease(grant, INTENT, confirmed=True, log=LeaseLog())
        # The attempt is new: the server has nothing of its log.
        lease.log.is_open = True
        self._held[lease.lease_id] = lease
        if lease.runtime not in self._runtimes:
            message = (
                f"this agent has no runtime {lease.runtime!r}; it has {', '.join(sorted(self._runtimes)) or 'none'}"
            )
            self._reject(lease, told.infrastructure("RUNTIME_UNKNOWN", message))
            return
        if grant.spec.WhichOneof("work") is None:
            message = "the job asks for a kind of work that this version of the agent does not know"
            self._reject(lease, told.infrastructure("WORK_UNKNOWN", message))
            return
        self._desk.record(PutLease(lease.lease_id, lease.job_id, grant.SerializeToString()))
        self._desk.after_commit(self._intended, lease)

    def _granted_again(self, lease: Lease, now_ns: int) -> None:
        if not lease.abandoned:
            lease.confirmed = True
            if not lease.log.is_open:
                lease.log.resume(lease.log.acked, now_ns)
                self.logs.moved(lease.lease_id, lease.log)
            self._renew(lease)
            self._begin_restored(lease)
        self._say_again(lease)

    def _intended(self, lease: Lease, error: str | None) -> None:
        if error is not None and not lease.stale:
            self._reject(lease, told.infrastructure("JOURNAL_UNAVAILABLE", error))
        elif lease.stale:
            self._forget(lease)
        elif lease.withdrawn is not None:
            self._give_back(lease, lease.withdrawn)
        elif lease.stop is not None:
            self._end(lease, told.ended(lease, outcomes.stopped_before_start(lease.stop.cause)))
        elif self._handover.must_wait(lease):
            fields = {"event": "gpus_not_free", "lease_id": lease.lease_id, "job_id": lease.job_id}
            log.info("lease waits for GPUs that an ended one has not left yet", extra=fields)
        else:
            lease.stage = PREPARING
            deadline_ns = lease.told_deadline_ns = lease.deadline_ns(self._session.renewed_ns)
            self._desk.put(Prepare(lease.lease_id, lease.runtime, lease.grant, deadline_ns))

    def _look_again(self, lease: Lease) -> None:
        """Something was said of a lease that may wait for GPUs: then it need not wait for them any more."""
        if self._handover.waits(lease.lease_id):
            self._intended(lease, None)

    def _secured(self, lease: Lease, error: str | None) -> None:
        if lease.stage is not SECURING:
            return
        if error is not None and not lease.stale:
            # Without its handle in the journal a restarted agent would end the
            # job as a stray: it must not begin.
            self._desk.events.remove(lease.accepted_seq)
            lease.rejected = told.infrastructure("JOURNAL_UNAVAILABLE", error)
            self._desk.put(Stop(lease.lease_id, StopCause.STALE, None))
            return
        lease.stage = ACCEPTED
        self._begin(lease)

    def _begin(self, lease: Lease) -> None:
        if lease.begun or lease.stop is not None or lease.abandoned:
            return
        lease.begun = True
        self._desk.put(Begin(lease.lease_id))

    def _begin_restored(self, lease: Lease) -> None:
        """Begins what was accepted before a restart: only once the server has confirmed it."""
        if lease.restored and lease.stage is ACCEPTED and lease.confirmed:
            self._begin(lease)

    def _stop(self, lease: Lease, cause: StopCause, grace: timedelta | None) -> None:
        if lease.stage is ENDED:
            self._say_again(lease)
            return
        if lease.stop is None:
            lease.stop = StopRequest(cause, grace)
        if lease.stage >= SECURING and not lease.abandoned:
            self._desk.put(Stop(lease.lease_id, cause, grace))
        elif lease.stage is PREPARING:
            lease.stop = StopRequest(lease.stop.cause, grace)
        else:
            self._look_again(lease)

    def _make_stale(self, lease: Lease) -> None:
        """Stops and forgets; nothing more is told about it."""
        lease.confirmed = False
        self.progress.drop(lease)
        lease.log.pause()
        self.logs.moved(lease.lease_id, lease.log)
        self._desk.drop(self._desk.events.remove_lease(lease.lease_id))
        if lease.stale:
            return
        lease.stale = True
        if lease.stage is ENDED:
            self._forget(lease)
        elif lease.stage >= SECURING:
            if lease.begun or lease.restored:
                self._handover.leaves(lease)
            self._desk.put(Stop(lease.lease_id, StopCause.STALE, None))
        else:
            self._look_again(lease)

    def _end(self, lease: Lease, event: pb.LeaseEvent) -> None:
        lease.stage = ENDED
        lease.ended_event = ended = event.ended
        lease.log.final_offset = ended.final_log_offset
        self._begun.pop(lease.lease_id, None)
        if log.isEnabledFor(logging.INFO):
            fields = {"event": "ended", "lease_id": lease.lease_id, "job_id": lease.job_id}
            log.info("job ended", extra={**fields, "outcome": Outcome(ended.outcome).name})
        self._desk.record(PutPhase(lease.lease_id, LeasePhase.DRAINING))
        if lease.checkpoint_next is not None:
            self._desk.tell(told.checkpoint(lease, lease.checkpoint_next), "checkpoint_saved")
            lease.checkpoint_next = None
        self._desk.tell(event, "ended")

    def _reject(self, lease: Lease, error: job_pb2.JobError) -> None:
        log.warning(
            "lease rejected",
            extra={
                "event": "rejected",
                "lease_id": lease.lease_id,
                "job_id": lease.job_id,
                "error_type": error.type,
                "error": error.message,
            },
        )
        self._leave(lease)
        event = pb.LeaseEvent(job_id=lease.job_id, lease_id=lease.lease_id, rejected=pb.Rejected(error=error))
        self._desk.tell(event, "rejected")

    def _give_back(self, lease: Lease, reason: str) -> None:
        log.info(
            "lease released",
            extra={"event": "released", "lease_id": lease.lease_id, "job_id": lease.job_id, "reason": reason},
        )
        self._leave(lease)
        self._desk.tell(told.released(lease.job_id, lease.lease_id, reason), "released")

    def _forget_if_done(self, lease: Lease) -> None:
        if lease.stage is ENDED and lease.end_acked and lease.log.complete:
            self._forget(lease)

    def _forget(self, lease: Lease) -> None:
        if log.isEnabledFor(logging.DEBUG):
            fields = {"event": "forgotten", "lease_id": lease.lease_id, "job_id": lease.job_id}
            log.debug("lease forgotten", extra=fields)
        dropped = self._desk.events.remove_lease(lease.lease_id)
        self._leave(lease)
        if dropped:
            self._desk.record(DropEvents(dropped))

    def _leave(self, lease: Lease) -> None:
        """No longer holds a lease. Its files go only after its row: a row without files would read as a loss."""
        lease_id = lease.lease_id
        self._held.pop(lease_id, None)
        self.progress.drop(lease)
        self.logs.forget(lease_id)
        self._unheld.bury(lease_id)
        self._desk.record(DropLease(lease_id))
        self._desk.put_after_commit(Forget(lease_id))
        for waiting in self._handover.gone(lease_id):
            self._intended(waiting, None)

    def _say_again(self, lease: Lease) -> None:
        """Repeats what is so of a held lease. What is not journalled yet is said when it is."""
        if lease.abandoned or lease.stage < ACCEPTED:
            return
        if lease.stage is ENDED and lease.ended_event is None:
            # Found again after a restart, and not read yet: it will be told.
            return
        if lease.lease_id in self._begun:
            return
        owed = self._desk.events.of_lease(lease.lease_id)
        self._desk.events.unsend(lease.lease_id)
        if lease.stage is ENDED and lease.ended_event is not None:
            kind, event = "ended", told.ended(lease, lease.ended_event)
        elif lease.stage is RUNNING:
            kind, event = "running", told.running(lease)
        else:
            kind = "accepted"
            event = told.accepted(lease)
        if all(pending.kind != kind for pending in owed):
            # Not journalled: it tells nothing that the journal does not know.
            self._desk.events.add(event, kind, committed=True)

    def _put_checkpoint(self, lease: Lease, cursor: str) -> None:
        # In the order they happened: it runs, then it saves.
        self.settle_begun()
        unsent = self._desk.events.get(lease.checkpoint_seq)
        lease.checkpoint_seq = self._desk.tell(told.checkpoint(lease, cursor), "checkpoint_saved").seq
        # With a live stream the older one is about to leave: replaced by each
        # next one, none would ever be sent.
        if unsent is not None and unsent.sent_ns is None and self._session.link is not Link.UP:
            self._desk.events.remove(unsent.seq)
            self._desk.record(DropEvents((unsent.seq,)))
        self._desk.after_commit(self._checkpointed, lease)

    def _checkpointed(self, lease: Lease, _error: str | None) -> None:
        if (cursor := lease.checkpoint_next) is not None and lease.stage is not ENDED:
            lease.checkpoint_next = None
            self._put_checkpoint(lease, cursor)

    def _resume_log(self, lease: Lease, answer: pb.LeaseAnswer, now_ns: int) -> None:
        if lease.abandoned:
            return
        position = position_of(answer.log) if answer.HasField("log") else Position()
        if position is None:
            log.error("contradictory log position ignored", extra={"event": "log_resume", "lease_id": lease.lease_id})
            position = lease.log.acked
        lease.log.resume(position, now_ns)
        self.logs.moved(lease.lease_id, lease.log)

    def _grow(self, lease: Lease, stdout_bytes: int, stderr_bytes: int) -> None:
        if stdout_bytes or stderr_bytes:
            lease.log.grow(stdout_bytes, stderr_bytes)
            self.logs.moved(lease.lease_id, lease.log)

    def _renew(self, lease: Lease) -> None:
        deadline_ns = lease.deadline_ns(self._session.renewed_ns)
        if deadline_ns == lease.told_deadline_ns:
            return
        if lease.confirmed and not lease.abandoned and SECURING <= lease.stage <= RUNNING:
            lease.told_deadline_ns = deadline_ns
            self._desk.put(Renew(lease.lease_id, deadline_ns))
