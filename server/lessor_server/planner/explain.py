"""Why a job is not running: the planning cycle, run until the job's turn.

The cycle that answers is the one that plans, over the same snapshot. So a job is
said to be STARTING exactly when a plan of that snapshot grants it, and the
reason given is the one the plan gives its group.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from lessor_server.domain.shape import Shape
from lessor_server.domain.states import JobState
from lessor_server.planner.cycle import Cycle
from lessor_server.planner.describe import (
    busy_reason,
    count_of,
    duration_text,
    gpu_limit_reason,
    never_fits_reason,
    no_agent_reason,
    no_runtime_reason,
    running_limit_reason,
)
from lessor_server.planner.fit import at_gpu_limit, at_running_limit
from lessor_server.planner.model import Agent, Candidate, Grant, Group, Policy, Queue
from lessor_server.planner.placement import Ground
from lessor_server.planner.reasons import PendingReason, Reason


@dataclass(frozen=True, slots=True)
class Subject:
    """The job to explain."""

    job_id: int
    state: JobState
    queue_id: int
    shape_id: int
    shape: Shape
    priority: int
    seq: int
    ahead: int = 0
    """Waiting jobs that go first, as the store counts them."""
    backoff_left: timedelta | None = None
    """How long a retry still waits; None or not positive: it does not."""
    failures: int = 0
    max_failures: int = 1
    last_error: str = ""
    """One sentence on how its last attempt ended; empty: none did, or nothing is known."""
    agent: str = ""
    """Name of the agent that holds its lease."""


def explain(
    job: Subject,
    fleet: Iterable[Agent],
    groups: Sequence[Group],
    queues: Mapping[int, Queue],
    policy: Policy,
) -> list[Reason]:
    """Returns why the job is not running, the deciding reason first; at least one.

    Args:
        job: The job; it need not be among the candidates of ``groups``.
        fleet: All known agents, as for ``plan``.
        groups: The waiting jobs, as for ``plan``.
        queues: queue_id → queue, at least the job's and those of the groups.
        policy: As for ``plan``; max_grants delays a job by a cycle at most and is no reason.

    Raises:
        KeyError: The job's queue is missing.
    """
    if job.state is JobState.LEASED:
        on = f"agent {job.agent}" if job.agent else "an agent"
        return [Reason(PendingReason.LEASED, f"{on} has a lease for it and prepares the start")]
    if job.state is not JobState.QUEUED:
        return [Reason(PendingReason.NOT_PENDING, f"the job is {job.state.name}: nothing is pending")]
    fleet = tuple(fleet)
    cycle = Cycle(Ground(fleet, policy.max_offers), _with(job, groups), queues)
    grant = _run_to(job, cycle)
    reasons = _backoff(job)
    if grant is not None:
        if not reasons:
            reasons.append(_starting(grant, fleet))
        return reasons
    return reasons + _queue_reasons(job, cycle) + _placement_reasons(job, cycle, fleet)


def _with(job: Subject, groups: Sequence[Group]) -> list[Group]:
    """Returns the groups with the job among the candidates: one in backoff, or far back in line, is not."""
    result = list(groups)
    candidate = Candidate(job.job_id, job.priority, job.seq)
    for number, group in enumerate(result):
        if (group.queue_id, group.shape_id) == (job.queue_id, job.shape_id):
            if candidate not in group.candidates:
                place = bisect_left(group.candidates, candidate.order, key=lambda other: other.order)
                candidates = (*group.candidates[:place], candidate, *group.candidates[place:])
                result[number] = replace(group, candidates=candidates, waiting=max(group.waiting, len(candidates)))
            return result
    result.append(Group(job.queue_id, job.shape_id, job.shape, (candidate,), 1))
    return result


def _run_to(job: Subject, cycle: Cycle) -> Grant | None:
    """Runs the cycle up to the job's grant, which it returns, or up to the closure of its group."""
    for step in cycle.steps():
        if isinstance(step, Grant):
            if step.job_id == job.job_id:
                return step
        elif (step.queue_id, step.shape_id) == (job.queue_id, job.shape_id):
            return None
    raise AssertionError(f"the planning cycle passed over job {job.job_id}")


def _backoff(job: Subject) -> list[Reason]:
    if job.backoff_left is None or job.backoff_left <= timedelta(0):
        return []
    left_ms = max(1, job.backoff_left // timedelta(milliseconds=1))
    after = f" after failure {job.failures} of at most {job.max_failures}" if job.failures else ""
    error = f"; the last attempt: {job.last_error}" if job.last_error else ""
    return [
        Reason(
            PendingReason.BACKOFF,
            f"it is tried again in {duration_text(left_ms)}{after}{error}",
            numbers={"backoff_left_ms": left_ms, "failures": job.failures, "max_failures": job.max_failures},
        )
    ]


def _starting(grant: Grant, fleet: Sequence[Agent]) -> Reason:
    name = next(agent.name for agent in fleet if agent.agent_id == grant.agent_id)
    gpus = f" with {count_of(len(grant.gpu_uuids), 'GPU')}" if grant.gpu_uuids else ""
    return Reason(
        PendingReason.STARTING,
        f"agent {name} has room for it{gpus}; it starts in the next planning cycle",
        numbers={"gpus": len(grant.gpu_uuids)},
    )


def _queue_reasons(job: Subject, cycle: Cycle) -> list[Reason]:
    """Returns every way the queue keeps the job back. A pause comes first, as in the cycle."""
    queue, running, gpus = cycle.queues[job.queue_id], cycle.running[job.queue_id], cycle.gpus[job.queue_id]
    reasons: list[Reason] = []
    if queue.paused:
        reasons.append(
            Reason(PendingReason.QUEUE_PAUSED, f"queue '{queue.name}' is paused", f"resume queue '{queue.name}'")
        )
    if queue.max_running is not None and at_running_limit(queue, running):
        reasons.append(running_limit_reason(queue.name, running, queue.max_running))
    if queue.max_gpus is not None and at_gpu_limit(queue, gpus, job.shape):
        reasons.append(gpu_limit_reason(queue.name, gpus, queue.max_gpus, job.shape.gpu_count))
    return reasons


def _placement_reasons(job: Subject, cycle: Cycle, fleet: Sequence[Agent]) -> list[Reason]:
    """Returns why no agent has room for it; none when one has."""
    ranking = cycle.ground.ranking(job.shape_id, job.shape)
    if ranking.best() is not None:
        return []
    match cycle.ground.unplaceable_reason(ranking):
        case PendingReason.NO_AGENT_CONNECTED:
            return [no_agent_reason(fleet)]
        case PendingReason.NO_AGENT_WITH_RUNTIME:
            return [no_runtime_reason(fleet, job.shape)]
        case PendingReason.NO_AGENT_FITS_EVER:
            return [never_fits_reason(fleet, job.shape)]
        case _:
            lacking = [
                (room.agent.name, ranking.shortfalls(room)) for room in cycle.ground.rooms if ranking.capable(room)
            ]
            return [busy_reason(fleet, job.shape, lacking, job.ahead)]
