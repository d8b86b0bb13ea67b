"""What a watcher is told of: which changes match, and how the contract shows them.

A change is made into its message once, whoever is told of it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lessor.ids import encode_job_id
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.services.job_view import timestamp
from lessor_server.store.database import Database
from lessor_server.store.event_queries import Event, Position
from lessor_server.store.job_queries import JobAttributes, read_attributes

_ATTRIBUTES_KEPT = 50_000
_ATTRIBUTES_READ = 5_000


@dataclass(frozen=True, slots=True)
class WatchFilter:
    """Which jobs to watch; all that is given must match. Equal filters are served as one."""

    numbers: frozenset[int] = frozenset()
    """These jobs; empty: all."""
    queue_id: int | None = None
    labels: frozenset[tuple[str, str]] = frozenset()

    @property
    def by_attributes(self) -> bool:
        """Whether a job must be looked up to know if it matches."""
        return self.queue_id is not None or bool(self.labels)

    def wants(self, number: int) -> bool:
        """Returns whether the job is one of those that are given, if any are."""
        return not self.numbers or number in self.numbers

    def accepts(self, attributes: JobAttributes | None) -> bool:
        """Returns whether a job with these attributes matches; None: the job is gone."""
        if not self.by_attributes:
            return True
        if attributes is None:
            return False
        if self.queue_id is not None and attributes.queue_id != self.queue_id:
            return False
        return all(attributes.labels.get(key) == value for key, value in self.labels)


class AttributeCache:
    """Queue and labels of jobs, which never change: the ones used last are kept."""

    def __init__(self, database: Database, kept: int = _ATTRIBUTES_KEPT) -> None:
        self._database = database
        self._kept = kept
        self._known: OrderedDict[int, JobAttributes] = OrderedDict()
        # Those who ask for the same jobs at the same moment: the first one reads.
        self._reading = asyncio.Lock()

    async def of(self, numbers: Iterable[int]) -> dict[int, JobAttributes]:
        """Returns number → attributes, of those jobs that exist.

        Raises:
            DatabaseUnavailable: The database does not answer.
        """
        async with self._reading:
            wanted = set(numbers)
            found: dict[int, JobAttributes] = {}
            for number in wanted & self._known.keys():
                self._known.move_to_end(number)
                found[number] = self._known[number]
            missing = sorted(wanted - found.keys())
            for start in range(0, len(missing), _ATTRIBUTES_READ):
                read = await read_attributes(self._database, missing[start : start + _ATTRIBUTES_READ])
                found.update(read)
                self._known.update(read)
            while len(self._known) > self._kept:
                self._known.popitem(last=False)
            return found


@dataclass(frozen=True, slots=True)
class News:
    """What of one event matches a filter. Shared by all who are told: not to be changed."""

    position: Position
    changes: Sequence[job_service_pb2.JobChange]


def shown(event: Event) -> list[job_service_pb2.JobChange]:
    """Returns the changes of an event as the contract has them, in its order."""
    at = timestamp(event.at)
    return [
        job_service_pb2.JobChange(
            job_id=encode_job_id(number), state=job_pb2.JobState.ValueType(state), attempt=attempt, time=at
        )
        for number, state, attempt in zip(event.job_numbers, event.states, event.attempts, strict=True)
    ]


def matching(
    wanted: WatchFilter,
    event: Event,
    changes: Sequence[job_service_pb2.JobChange],
    known: Mapping[int, JobAttributes],
) -> News | None:
    """Returns what of an event matches; None: nothing.

    Args:
        wanted: The filter.
        event: The event.
        changes: The same, as :func:`shown`.
        known: Number → attributes of the event's jobs; needed by a filter that is by attributes.
    """
    if not wanted.numbers and not wanted.by_attributes:
        return News(event.position, changes)
    found = [
        change
        for number, change in zip(event.job_numbers, changes, strict=True)
        if wanted.wants(number) and wanted.accepts(known.get(number))
    ]
    return News(event.position, found) if found else None
