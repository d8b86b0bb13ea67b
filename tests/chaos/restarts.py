"""The restart matrix: each part of Lessor is taken away in each way, under running jobs.

A cell has a world of its own: jobs that all run, one restart, and then the same
questions as after chaos, with exact counts. Some jobs end while the part is away
and the others once it is back. What may be killed follows from what a job asked
for (``on_lease_lost``), and from nothing else.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lessor.ids import encode_job_id
from lessor.lifecycle import Outcome
from tests.chaos.checker import Kind, check
from tests.chaos.evidence import collect
from tests.chaos.faults import UNREACHABLE, Way
from tests.chaos.history import Fault, History, Submitted, read_executions
from tests.chaos.load import Load, Plan, Policy
from tests.chaos.overlay import Edit
from tests.chaos.parts import KEEPERS_KILLED, PARTS, Trial
from tests.chaos.run import Tell, come_to_rest
from tests.chaos.scenarios import until
from tests.chaos.workload import now_ns
from tests.chaos.world import Shape, World, running_world

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verification.md"
MARK = "<!-- restarts -->\n\n"
"""The table stands behind it."""

JOBS = 50
AGENTS = 4
TTL_S = 10
"""Of jobs that are there to see it run out, or not."""
LONG_TTL_S = 30
"""Of jobs whose part is killed and started at once: a busy host may take its time over that."""
AWAY_S = 2.0 * TTL_S
"""How long a stopped process stands still."""
_LOOK_S = 0.2
_BEGIN_S = 90.0
_BACK_S = 60.0
_REST_S = 60.0


_MATRIX = ("agent", "keeper", "server", "leader", "Postgres")
_LEASES_RUN_OUT = ("agent", "Postgres", "control plane")
"""Without these nobody renews: away for longer than a ttl, they cost every lease."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One restart, and what it may cost."""

    part: str
    """Name in :data:`PARTS`."""
    way: Way
    on_lease_lost: Policy | None = None
    """Of its jobs; None: it decides nothing here, and they do not say."""
    away_s: float = 0.0
    """The part is away for at least this long; 0: until the jobs that end meanwhile have ended."""

    @property
    def name(self) -> str:
        """Such as ``agent TERM``."""
        return " ".join(filter(None, (self.part, self.way, self.on_lease_lost)))

    def killed(self, running: int) -> range:
        """Returns how many executions it may cost, of so many that do not end meanwhile."""
        if (self.part, self.way) == ("keeper", Way.KILL):
            return range(KEEPERS_KILLED, KEEPERS_KILLED + 1)
        if self.part not in _LEASES_RUN_OUT or self.away_s < TTL_S:
            return range(1)
        if self.on_lease_lost == "stop":
            return range(running, running + 1)
        # While all agents stand still lease time goes on: the leases end, whatever a keeper does with the work.
        return range(running + 1) if self.part == "agent" else range(1)


def matrix() -> list[Cell]:
    """Returns all cells: what a policy decides stands there once for each policy."""
    cells = []
    for part in _MATRIX:
        for way in Way:
            away_s = AWAY_S if way is Way.STOP else 0.0
            decided = way is Way.STOP and part in _LEASES_RUN_OUT
            policies: tuple[Policy | None, ...] = ("stop", "freeze") if decided else (None,)
            cells += [Cell(part, way, policy, away_s) for policy in policies]
    return cells


def outage(away_s: float) -> Cell:
    """Returns the cell in which database and replicas are gone for so long; its jobs are frozen meanwhile."""
    return Cell("control plane", Way.KILL, "freeze", away_s)


# ── trying a cell ────────────────────────────────────────────────────────────


@dataclass
class Finding:
    """What came of a cell."""

    cell: Cell
    jobs: int
    killed: int
    """Executions that did not end by themselves."""
    re_runs: int
    """Executions of a job beyond its first."""
    lost: int
    """Attempts that are recorded as LOST."""
    unexplained: int
    """Of these, those that nothing explains."""
    back_s: float
    """From when the part was back until all agents had renewed their leases."""
    wrong: Sequence[str]
    """Everything that is not as it was promised; empty: nothing."""

    def row(self) -> list[object]:
        """Returns its row of the table."""
        cell, lost = self.cell, f"{self.lost - self.unexplained} of {self.lost}" if self.lost else 0
        how = f"{cell.way}, {cell.away_s:g} s" if cell.away_s else cell.way
        policy = f"`{cell.on_lease_lost}`" if cell.on_lease_lost else ""
        return [cell.part, how, policy, self.jobs, self.killed, self.re_runs, lost]

    def __str__(self) -> str:
        told = f"{self.cell.name:24} {self.jobs} jobs, {self.killed} killed, {self.re_runs} re-runs, {self.lost} lost"
        return "\n  ".join([f"{told}, renewed again after {self.back_s:.1f} s", *self.wrong[:20]])


async def try_cell(cell: Cell, jobs: int = JOBS, edits: Sequence[Edit] = (), keep: Path | None = None) -> Finding:
    """Tries a cell in a world of its own.

    Args:
        cell: Which.
        jobs: How many run.
        edits: Bugs to plant.
        keep: An empty directory for everything that is left; None: a temporary one.

    Raises:
        TimeoutError: The jobs did not all begin, or the agents did not come back.
        WorldBroken: What is to be taken away is not there.
    """
    with tempfile.TemporaryDirectory(prefix="lessor-restart-", ignore_cleanup_errors=True) as temporary:
        # Room for all jobs and hardly more: one that is lost waits for its host rather than goes elsewhere.
        shape = Shape(agents=AGENTS, replicas=2, networks=False, gpus=0, cpus=-(-jobs // AGENTS), edits=edits)
        async with running_world(keep or Path(temporary), shape, 0) as world, world.client() as client:
            return await _try(cell, Trial(world, cell.way, Load(world, client, random.Random(0))), jobs)


async def _try(cell: Cell, trial: Trial, jobs: int) -> Finding:
    world = trial.world
    for relay in (world.front, *(agent.relay for agent in world.agents)):
        relay.targets = trial.targets
    early = jobs // 5
    ends = await trial.load.submit([_plan(cell, trial, number, "early") for number in range(early)])
    trial.lasting = await trial.load.submit([_plan(cell, trial, number, "late") for number in range(early, jobs)])
    await until(lambda: _running(world) == jobs, _BEGIN_S, _LOOK_S)
    begun_ns = now_ns()
    async with PARTS[cell.part](trial):
        away_ns = now_ns()
        trial.open("early")
        await until(lambda: _ended(world, ends), _BEGIN_S, _LOOK_S)
        await asyncio.sleep(max(0.0, cell.away_s - (now_ns() - away_ns) / 1e9))
    if not trial.faults:
        trial.faults.append(Fault(cell.name, "all", begun_ns, now_ns()))
    back_s = await _renewed(world)
    trial.open("late")
    await come_to_rest(world, _REST_S)
    history = await collect(world, trial.load.submitted.values(), trial.faults)
    return _judge(cell, trial, history, back_s)


def _plan(cell: Cell, trial: Trial, number: int, gate: str) -> Plan:
    return Plan(
        # It prints all along, and what it prints while the part is away is its log as well.
        seconds=(1.0 if gate == "early" else cell.away_s + 2.0),
        lines=40,
        children=int(number % 6 == 0),
        stubborn=number % 5 == 0,
        ttl_s=TTL_S if cell.away_s else LONG_TTL_S,
        gate=trial.gate(gate),
        on_lease_lost=cell.on_lease_lost or "freeze",
    )


def _running(world: World) -> int:
    """Returns how many executions have begun to tick."""
    return sum(b"tick" in path.read_bytes() for path in world.diaries.glob("*.main"))


def _ended(world: World, jobs: Sequence[Submitted]) -> bool:
    wanted = {encode_job_id(job.job_number) for job in jobs}
    return wanted <= {one.job_id for one in read_executions(world.diaries) if one.exit_code is not None}


_RENEWED = "SELECT count(DISTINCT agent_id) FROM session WHERE renewed_at > $1"


async def _renewed(world: World) -> float:
    """Waits until every agent has renewed its leases, from now on. Returns how many seconds that took."""
    begin_s, since = time.monotonic(), None
    async with asyncio.timeout(_BACK_S):
        while True:
            with suppress(*UNREACHABLE):
                async with world.database() as connection:
                    if since is None:
                        since = await connection.fetchval("SELECT clock FROM leader")
                    elif await connection.fetchval(_RENEWED, since) == len(world.agents):
                        return time.monotonic() - begin_s
            await asyncio.sleep(_LOOK_S)


def _judge(cell: Cell, trial: Trial, history: History, back_s: float) -> Finding:
    """Counts, and compares with what was promised."""
    violations = check(history)
    attempts = Counter(row.job_number for row in history.attempts)
    begun = Counter(one.job_id for one in history.executions)
    killed = sum(one.exit_code is None for one in history.executions)
    re_runs = len(history.executions) - len(begun)
    succeeded = {row.job_number for row in history.attempts if row.outcome is Outcome.SUCCEEDED}
    wrong = [str(violation) for violation in violations]
    wrong += [f"{name} did not succeed" for name in _names(trial, lambda job: job.job_number not in succeeded)]
    wrong += [
        f"{name} has another number of attempts than of executions"
        for name in _names(trial, lambda job: attempts[job.job_number] != begun[encode_job_id(job.job_number)])
    ]
    allowed = cell.killed(len(trial.lasting))
    if killed not in allowed:
        wrong.append(f"{killed} killed, not {' to '.join(str(end) for end in sorted({allowed[0], allowed[-1]}))}")
    if re_runs != killed:
        wrong.append(f"{re_runs} re-runs of {killed} that were killed")
    programs = (*trial.world.agents, *trial.world.replicas)
    wrong += [f"{program.name} ended by itself" for program in programs if not program.running]
    return Finding(
        cell,
        jobs=len(history.submitted),
        killed=killed,
        re_runs=re_runs,
        lost=sum(row.outcome is Outcome.LOST for row in history.attempts),
        unexplained=sum(violation.kind is Kind.UNEXPLAINED for violation in violations),
        back_s=back_s,
        wrong=wrong,
    )


def _names(trial: Trial, matches: Callable[[Submitted], bool]) -> list[str]:
    return [job.name for job in trial.load.submitted.values() if matches(job)]


# ── the whole matrix ─────────────────────────────────────────────────────────


async def run_restarts(names: Sequence[str], tell: Tell, away_s: float = 0.0, keep: Path | None = None) -> int:
    """Tries cells, tells what came of each, and prints the table. Returns 0 if all was as promised, 1 if not, 2 if
    a name is none.

    The whole matrix, if it was as promised, is written into the docs.

    Args:
        names: Of cells, or of parts; empty: the whole matrix.
        tell: Takes lines.
        away_s: Not 0: tries the outage of database and replicas for so long as well.
        keep: An empty directory in which everything is left for inspection.
    """
    cells = [*matrix(), *([outage(away_s)] if away_s else [])]
    if unknown := set(names) - {name for cell in cells for name in (cell.name, cell.part)}:
        tell(f"no cell {', '.join(sorted(unknown))}: there are {', '.join(cell.name for cell in cells)}")
        return 2
    findings, failed = [], 0
    for cell in (cell for cell in cells if not names or {cell.name, cell.part} & set(names)):
        directory = None
        if keep is not None:
            directory = keep / cell.name.replace(" ", "-")
            directory.mkdir()
        try:
            finding = await try_cell(cell, keep=directory)
        except Exception as error:
            # Said with the others' findings: what broke one world is nothing to the next.
            tell(f"{cell.name:24} did not come to its end: {type(error).__name__}: {error}")
            failed += 1
            continue
        tell(str(finding))
        findings.append(finding)
        failed += bool(finding.wrong)
    tell(f"{len(findings)} cells, {failed} not as promised")
    if not names and not failed:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table(findings)), encoding="utf-8")
    else:
        tell(table(findings))
    return 1 if failed else 0


def table(findings: Sequence[Finding]) -> str:
    """Returns findings as a table of Markdown."""
    head = ["restarted", "how", "`on_lease_lost`", "jobs", "killed", "re-runs", "losses explained"]
    rows: list[Sequence[object]] = [head, ["---"] * len(head), *(finding.row() for finding in findings)]
    return "".join(f"| {' | '.join(str(word) for word in row)} |\n" for row in rows)


def with_table(page: str, rows: str) -> str:
    """Returns a page with ``rows`` for the table behind the mark.

    Raises:
        ValueError: There is no mark.
    """
    before, mark, rest = page.partition(MARK)
    if not mark:
        raise ValueError(f"there is no {MARK.strip()} for the table to stand behind")
    lines = rest.splitlines(keepends=True)
    while lines and lines[0].startswith("|"):
        lines.pop(0)
    after = "".join(lines).lstrip("\n")
    return f"{before}{mark}{rows}\n{after}" if after else f"{before}{mark}{rows}"
