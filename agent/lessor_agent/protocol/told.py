"""What an agent tells of a lease: the events, made from what is so."""

from __future__ import annotations

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol import outcomes
from lessor_agent.protocol.lease import Lease

_ACCEPTED = pb.Accepted()


def accepted(lease: Lease) -> pb.LeaseEvent:
    """It is accepted."""
    return pb.LeaseEvent(job_id=lease.job_id, lease_id=lease.lease_id, accepted=_ACCEPTED)


def running(lease: Lease) -> pb.LeaseEvent:
    """Its workload runs, since when if that is known."""
    event = pb.Running(start_time=outcomes.timestamp(lease.start_time) if lease.start_time is not None else None)
    return pb.LeaseEvent(job_id=lease.job_id, lease_id=lease.lease_id, running=event)


def ended(lease: Lease, event: pb.Ended) -> pb.LeaseEvent:
    """Its workload has ended, so."""
    return pb.LeaseEvent(job_id=lease.job_id, lease_id=lease.lease_id, ended=event)


def checkpoint(lease: Lease, cursor: str) -> pb.LeaseEvent:
    """Its workload saved a checkpoint."""
    saved = pb.CheckpointSaved(cursor=cursor)
    return pb.LeaseEvent(job_id=lease.job_id, lease_id=lease.lease_id, checkpoint_saved=saved)


def released(job_id: str, lease_id: int, reason: str) -> pb.LeaseEvent:
    """It is given back, and nothing of it runs."""
    return pb.LeaseEvent(job_id=job_id, lease_id=lease_id, released=pb.Released(reason=reason))


def infrastructure(type_: str, message: str) -> job_pb2.JobError:
    """An error that is the host's, not the job's."""
    return outcomes.job_error(job_pb2.ERROR_CLASS_INFRASTRUCTURE, type_, message, retryable=True)
