"""Making leases of waiting jobs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg

from lessor_server.store.database import Statements


class Offer(NamedTuple):
    """A waiting job and the session it is to go to."""

    job_id: int
    session_id: int
    epoch: int
    gpu_uuids: Sequence[str] = ()


async def claim(
    database: Statements, epoch: int, offers: Sequence[Offer], now: datetime | None = None
) -> list[asyncpg.Record]:
    """Makes leases of all that may be had, in one transaction.

    Returns one row per lease made, with what its Grant needs. Left out are jobs
    that no longer wait or are being cancelled, and sessions that have moved on.

    Args:
        database: The store.
        epoch: The leader's term; in an old one nothing is made.
        offers: At least one, each of another job.
        now: The time; None: the database's clock.

    Raises:
        DatabaseUnavailable: The outcome is unknown.
        asyncpg.UniqueViolationError: A GPU is held, or a job has a lease; nothing was made.
    """
    values: dict[str, Any] = {
        "job_ids": [offer.job_id for offer in offers],
        "session_ids": [offer.session_id for offer in offers],
        "epochs": [offer.epoch for offer in offers],
        "gpu_uuids": [",".join(offer.gpu_uuids) for offer in offers],
    }
    job_ids = values["job_ids"]
    return await database.fetch(
        "claim", epoch=epoch, now=now, lowest_job_id=min(job_ids), highest_job_id=max(job_ids), **values
    )
