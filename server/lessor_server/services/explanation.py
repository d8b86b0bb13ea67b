"""Why a job is not running: loads what the planner would see and asks it."""

from __future__ import annotations

from lessor.ids import encode_job_id
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.domain.errors import JobNotFound
from lessor_server.domain.states import JobState
from lessor_server.planner.explain import Subject, explain
from lessor_server.planner.model import Group, Policy
from lessor_server.planner.reasons import Reason
from lessor_server.services.job_view import job_proto
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.fleet_queries import WaitingRow, load_fleet, load_groups, load_queues, read_waiting
from lessor_server.store.job_queries import read_jobs

_PER_GROUP = 500
_CANDIDATES = 2_000
"""Of many groups fewer jobs each are looked at, but always the job itself: an answer takes milliseconds."""

_ERROR_CHARS = 200


class Explainer:
    """Answers ExplainJob with the planner's own reasons."""

    def __init__(self, database: Database, catalog: Catalog, policy: Policy | None = None) -> None:
        """``policy`` is that of the planning loop."""
        self._database = database
        self._catalog = catalog
        self._policy = policy or Policy()

    async def explain(self, number: int) -> job_service_pb2.ExplainJobResponse:
        """Returns where the job stands and why it does not run, the deciding reason first.

        The parts are read one after the other: the answer is what a planning
        cycle that reads them at the same moments would decide.

        Raises:
            JobNotFound: There is no such job.
        """
        row = (await read_jobs(self._database, [number])).get(number)
        job = job_proto(row) if row else None
        waiting = await read_waiting(self._database, number)
        if job is None or waiting is None:
            raise JobNotFound(encode_job_id(number))
        subject = await self._subject(number, job, waiting)
        if subject.state is JobState.QUEUED:
            groups = await self._groups()
            queues = await load_queues(self._database)
            fleet = await load_fleet(self._database)
            reasons = explain(subject, fleet, groups, queues, self._policy)
        else:
            reasons = explain(subject, [], [], {}, self._policy)
        return job_service_pb2.ExplainJobResponse(state=job.state, explanations=[_proto(reason) for reason in reasons])

    async def _groups(self) -> list[Group]:
        """Returns the waiting jobs that may go before others, the first ones of each (queue, shape)."""
        first = await load_groups(self._database, self._catalog, 1)
        per_group = min(_PER_GROUP, _CANDIDATES // max(1, len(first)))
        return await load_groups(self._database, self._catalog, per_group) if per_group > 1 else first

    async def _subject(self, number: int, job: job_pb2.Job, waiting: WaitingRow) -> Subject:
        shapes = await self._catalog.shapes([waiting.shape_id])
        return Subject(
            job_id=number,
            state=JobState(job.state),
            queue_id=waiting.queue_id,
            shape_id=waiting.shape_id,
            shape=shapes[waiting.shape_id],
            priority=waiting.priority,
            seq=number,
            ahead=waiting.ahead,
            backoff_left=waiting.backoff_left,
            failures=job.failures,
            max_failures=waiting.max_failures,
            last_error=_sentence(job),
            agent=job.agent,
        )


def _sentence(job: job_pb2.Job) -> str:
    """Returns one line on how the last attempt ended; empty when none did."""
    text = " ".join((job.error.message or job.error.type).split()) if job.HasField("error") else ""
    if not text and job.HasField("exit_code"):
        text = f"exit code {job.exit_code}"
    return text if len(text) <= _ERROR_CHARS else text[: _ERROR_CHARS - 1] + "…"


def _proto(reason: Reason) -> job_service_pb2.Explanation:
    return job_service_pb2.Explanation(
        reason=job_service_pb2.PendingReason.ValueType(reason.reason),
        message=reason.message,
        remedy=reason.remedy,
        numbers=reason.numbers,
    )
