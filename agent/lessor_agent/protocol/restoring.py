"""A journalled lease in the hands of a restarted agent."""

from __future__ import annotations

from lessor.lifecycle import LeasePhase
from lessor_agent.protocol.events import EventLog
from lessor_agent.protocol.lease import ACCEPTED, ENDED, INTENT, RUNNING, Fate, Lease, RestoredLease
from lessor_agent.protocol.logflow import LeaseLog

_STAGES = {LeasePhase.ACCEPTED: ACCEPTED, LeasePhase.RUNNING: RUNNING, LeasePhase.DRAINING: ENDED}


def take_up(found: RestoredLease, events: EventLog) -> Lease:
    """Returns the lease as far as the journal knows it; what is still owed of it is among ``events``."""
    stage = _STAGES.get(found.phase, INTENT)
    lease = Lease(found.grant, stage, confirmed=False, log=LeaseLog(), restored=True)
    lease.begun = stage >= RUNNING
    # Until an end is found that is still owed.
    lease.end_acked = stage is ENDED
    for pending in events.of_lease(lease.lease_id):
        if pending.kind == "checkpoint_saved":
            lease.checkpoint_seq = pending.seq
        elif pending.kind == "ended":
            # An end that is still owed is repeated as it was journalled. One
            # that was acked has only its log to finish.
            lease.stage = ENDED
            lease.end_acked = False
            lease.ended_event = pending.event.ended
            # Where the files are gone there is nothing left to send: the
            # lease is forgotten after its end, and the server says that
            # the log was cut.
            kept = found.fate is Fate.FOUND
            lease.log.final_offset = lease.ended_event.final_log_offset if kept else 0
    return lease
