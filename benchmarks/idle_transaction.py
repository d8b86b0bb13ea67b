"""A steady load while somebody has left a transaction open: what claims cost, and whether jobs pile up.

A claim's time is PostgreSQL's own: a share of all statements is written to its log with their duration, and the
claims among them are taken. The backlog is what was submitted less the leases made: two numbers, where a count of
rows would itself read what the open transaction keeps from being cleaned away.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from benchmarks.load import Load
from benchmarks.report import Cell, median, percentile
from benchmarks.system import Bench, Fleet, Postgres, Server

QUEUE = "steady"
SETTINGS = {
    "log_min_duration_sample": "0",
    "log_statement_sample_rate": "0.1",
    "log_parameter_max_length": "0",
    "log_line_prefix": "%n ",
}
"""For the PostgreSQL that is measured: one statement in ten says how long it took, and when."""

_BATCH = 50
_RECORD = re.compile(r"^(?=\d+\.\d+ [A-Z]+:  )", re.MULTILINE)
_DURATION = re.compile(r"(\d+\.\d+) LOG:  duration: (\d+\.\d+) ms  (\w+) ")
"""When (Unix seconds), how long (ms), and which part: the parse, the bind or the execution of a statement."""
CLAIM = "nextval('lease_number')"
"""No other statement has it."""


@dataclass(frozen=True)
class Held:
    """How a steady load went, second by second."""

    offered_per_s: int
    seconds: float
    submitted: int
    backlogs: list[int] = field(default_factory=list)
    """Jobs without a lease, each second."""
    claims: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the begin, ms) of the claims that were logged."""

    def claim_ms(self, share: float, *, since: float = 0.0) -> float:
        """Returns a percentile of the claims' times in what follows ``since`` (0 … 1 of the time); NaN of none."""
        return percentile([ms for at, ms in self.claims if at >= since * self.seconds], share)

    def backlog_s(self) -> float:
        """Returns how many seconds' worth of jobs waited at the end: the median of the last tenth of the time."""
        last = self.backlogs[-max(1, len(self.backlogs) // 10) :]
        return median(last) / self.offered_per_s

    def rows(self, what: str, parts: int = 5) -> Iterator[dict[str, Cell]]:
        """Yields rows of a table, one per part of the time."""
        for part in range(parts):
            begin, end = part * self.seconds / parts, (part + 1) * self.seconds / parts
            claims = [ms for at, ms in self.claims if begin <= at < end]
            backlogs = self.backlogs[len(self.backlogs) * part // parts : len(self.backlogs) * (part + 1) // parts]
            yield {
                "what": what,
                "seconds": f"{begin:.0f} to {end:.0f}",
                "claims logged": len(claims),
                "claim p50 ms": percentile(claims, 0.5),
                "claim p99 ms": percentile(claims, 0.99),
                "backlog p50": median(backlogs),
                "backlog max": max(backlogs, default=0),
            }


def hold(
    bench: Bench, postgres: Postgres, server: Server, fleet: Fleet, *, per_s: int, seconds: float, pinned: bool
) -> Held:
    """Offers ``per_s`` jobs a second for ``seconds``, ``pinned`` under an open transaction.

    PostgreSQL must run with :data:`SETTINGS`, and :data:`QUEUE` exist.
    """
    return asyncio.run(_hold(bench, postgres, server, fleet, per_s=per_s, seconds=seconds, pinned=pinned))


async def _hold(
    bench: Bench, postgres: Postgres, server: Server, fleet: Fleet, *, per_s: int, seconds: float, pinned: bool
) -> Held:
    log = postgres.made.data_dir / "postgres.log"
    skip = log.stat().st_size
    connection = await asyncpg.connect(postgres.url)
    try:
        async with _open_transaction(postgres, wanted=pinned):
            leases_before = await connection.fetchval(_LEASES_MADE)
            backlogs = []
            began, began_unix = time.monotonic(), time.time()
            with Load(server, [QUEUE], per_s, batch=_BATCH) as load:
                while (elapsed := time.monotonic() - began) < seconds:
                    await asyncio.sleep(min(1.0, seconds - elapsed))
                    made = await connection.fetchval(_LEASES_MADE) - leases_before
                    backlogs.append(max(0, load.submitted - made))
                    if len(backlogs) % 30 == 0:
                        bench.say(f"{len(backlogs)} s: {backlogs[-1]} jobs without a lease")
                took = time.monotonic() - began
                submitted = load.submitted
    finally:
        await connection.close()
    claims = [(at - began_unix, ms) for at, ms in logged_claims(log, skip)]
    return Held(per_s, took, submitted, backlogs, claims)


_LEASES_MADE = "SELECT last_value FROM lease_number"


@asynccontextmanager
async def _open_transaction(postgres: Postgres, *, wanted: bool) -> AsyncIterator[None]:
    """A transaction with a number and a snapshot, idle while the block runs."""
    if not wanted:
        yield
        return
    connection = await asyncpg.connect(postgres.url)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT txid_current()")
            yield
    finally:
        await connection.close()


def logged_claims(log: Path, skip: int) -> Iterator[tuple[float, float]]:
    """Yields (Unix time, ms) of the claims in PostgreSQL's log, from byte ``skip`` on.

    Each part of a statement is logged or left out by itself: to what an execution took is added the median bind.
    """
    with log.open("rb") as file:
        file.seek(skip)
        text = file.read().decode(errors="replace")
    parts: dict[str, list[tuple[float, float]]] = {}
    for record in _RECORD.split(text):
        if CLAIM in record and (found := _DURATION.match(record)):
            at, ms, part = found.groups()
            parts.setdefault(part, []).append((float(at), float(ms)))
    binds = [ms for _, ms in parts.get("bind", [])]
    bind_ms = median(binds) if binds else 0.0
    for at_s, execute_ms in parts.get("execute", []):
        yield at_s, execute_ms + bind_ms
