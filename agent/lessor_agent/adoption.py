"""What a restarted agent finds: its journal against what really runs on the host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from lessor_agent.journal import Contents, JournalledLease
from lessor_agent.protocol.core import Restored
from lessor_agent.protocol.lease import Fate, RestoredLease
from lessor_agent.runtimes.base import Execution, ExecutionVanished, Runtime, StopCause

log = logging.getLogger(__name__)

STRAY_GRACE = timedelta(seconds=5)
"""From SIGTERM to SIGKILL for executions the journal does not know."""

STRAY_WAIT_S = 30.0
"""A stray that is not gone after this is reported, and waited for in the background."""


class AdoptionImpossible(Exception):
    """Journalled leases belong to a runtime that does not work here now; the message names it."""


@dataclass(slots=True)
class Adopted:
    """The state a restarted agent goes on from."""

    restored: Restored
    executions: dict[int, Execution] = field(default_factory=dict)
    """lease_id → its execution."""
    rebooted: bool = False
    """The host has booted since the journal was last opened."""
    stuck: dict[int, Execution] = field(default_factory=dict)
    """lease_id → execution without a lease that was told to end and does not yet."""


async def adopt(contents: Contents, runtimes: Mapping[str, Runtime], boot_id: str) -> Adopted:
    """Finds every journalled lease again, and ends what runs without being journalled.

    Args:
        contents: The journal, as it was opened.
        runtimes: Name → open runtime.
        boot_id: The host's present boot.

    Raises:
        AdoptionImpossible: A journalled lease needs a runtime that is not open.
    """
    rebooted = bool(contents.boot_id) and contents.boot_id != boot_id
    executions: dict[int, Execution] = {}
    leases = []
    for lease in contents.leases:
        fate = await _adopt_one(lease, runtimes, executions, rebooted=rebooted)
        leases.append(RestoredLease(lease.grant, lease.phase, fate))
        log.info(
            "journalled lease taken up",
            extra={
                "event": "adopted",
                "lease_id": lease.grant.lease_id,
                "job_id": lease.grant.job_id,
                "phase": lease.phase.name,
                "fate": fate.value,
            },
        )
    known = {lease.grant.lease_id for lease in contents.leases if lease.handle is not None}
    stuck: dict[int, Execution] = {}
    for remains in await asyncio.gather(*(end_strays(runtime, known) for runtime in runtimes.values())):
        stuck |= remains
    restored = Restored(tuple(leases), contents.events, contents.tombstones, contents.last_seq, tuple(stuck))
    return Adopted(restored, executions, rebooted, stuck)


async def _adopt_one(
    lease: JournalledLease, runtimes: Mapping[str, Runtime], executions: dict[int, Execution], *, rebooted: bool
) -> Fate:
    if lease.handle is None:
        return Fate.NEVER_PREPARED
    runtime = runtimes.get(lease.handle.runtime)
    if runtime is None:
        raise AdoptionImpossible(
            f"lease {lease.grant.lease_id} of job {lease.grant.job_id} runs on the runtime {lease.handle.runtime!r}, "
            "which does not work here now; make it work again, or wait until the job's lease has run out"
        )
    try:
        execution = await runtime.adopt(lease.handle)
    except ExecutionVanished:
        return Fate.REBOOTED if rebooted else Fate.VANISHED
    executions[lease.grant.lease_id] = execution
    return Fate.FOUND


async def end_strays(runtime: Runtime, known: set[int], only: int | None = None) -> dict[int, Execution]:
    """Ends and forgets executions that no lease stands for.

    Args:
        runtime: Where to look.
        known: lease_ids that are not strays.
        only: If given, nothing but the execution of this lease_id is touched.

    Returns:
        lease_id → execution that was told to end and had not after
        :data:`STRAY_WAIT_S`. Until it has, nobody may say that it does not run.
    """
    stuck: dict[int, Execution] = {}
    for handle in await runtime.strays():
        try:
            execution = await runtime.adopt(handle)
        except ExecutionVanished:
            continue
        if execution.lease_id in known or (only is not None and execution.lease_id != only):
            continue
        log.warning("execution without a lease is ended", extra={"event": "stray", "lease_id": execution.lease_id})
        try:
            await execution.stop(StopCause.STALE, STRAY_GRACE)
            await asyncio.wait_for(execution.wait(), STRAY_WAIT_S)
        except TimeoutError:
            log.error(
                "execution without a lease does not end; nothing is said of its lease until it has",
                extra={"event": "stray_stuck", "lease_id": execution.lease_id},
            )
            stuck[execution.lease_id] = execution
            continue
        except ExecutionVanished:
            pass
        await execution.forget()
    return stuck
