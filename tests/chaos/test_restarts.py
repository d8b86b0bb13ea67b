"""Restarts under running jobs: cells of the matrix (`make restarts` tries all), and replicas that go one by one."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import lessor
from lessor.ids import encode_job_id
from lessor.lifecycle import Outcome
from tests.chaos.checker import check
from tests.chaos.evidence import collect
from tests.chaos.faults import Way
from tests.chaos.load import Load, Plan
from tests.chaos.overlay import Edit
from tests.chaos.restarts import MARK, Cell, Finding, matrix, run_restarts, table, try_cell, with_table
from tests.chaos.run import come_to_rest
from tests.chaos.scenarios import until
from tests.chaos.workload import printed
from tests.chaos.world import Shape, World, running_world

pytestmark = pytest.mark.chaos

HANDED_OVER_S = 1.0
"""A leader that stops is followed within this; one that is killed, after 1.5 s at the earliest."""
JOBS = 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "cell", [Cell("agent", Way.KILL), Cell("keeper", Way.KILL), Cell("leader", Way.KILL)], ids=lambda cell: cell.name
)
async def test_a_restart_costs_what_it_may_and_no_more(cell: Cell) -> None:
    finding = await try_cell(cell, JOBS)
    assert not finding.wrong, str(finding)
    assert finding.jobs == JOBS


@pytest.mark.timeout(120)
async def test_a_server_that_disowns_what_a_restarted_agent_holds_is_noticed() -> None:
    keeps = 'row["phase"] == LeasePhase.DRAINING else Answer.KEEP'
    disowns = Edit("lessor_server/store/hello.py", keeps, keeps.replace("KEEP", "STALE"))
    finding = await try_cell(Cell("agent", Way.KILL), JOBS, [disowns])
    assert finding.killed > 0
    assert f"{finding.killed} killed, not 0" in finding.wrong
    assert finding.re_runs == JOBS, "those that had ended are run again as well"


def test_what_a_restart_may_cost_follows_from_the_policy_of_the_jobs() -> None:
    cells = {cell.name: cell for cell in matrix()}
    assert {(cell.part, cell.way) for cell in cells.values()} >= {
        (part, way) for part in ("agent", "keeper", "server", "leader", "Postgres") for way in Way
    }
    free = [cell for cell in cells.values() if cell.part in ("server", "leader") or cell.way is Way.TERM]
    assert {tuple(cell.killed(40)) for cell in free} == {(0,)}
    assert tuple(cells["keeper KILL"].killed(40)) == (5,)
    assert tuple(cells["keeper STOP"].killed(40)) == (0,)
    assert tuple(Cell("Postgres", Way.STOP, "stop", 20.0).killed(40)) == (40,)
    assert tuple(Cell("Postgres", Way.STOP, "freeze", 20.0).killed(40)) == (0,)


def test_the_table_of_a_page_is_replaced_and_nothing_else() -> None:
    clean = Finding(Cell("keeper", Way.KILL), 50, 5, 5, lost=5, unexplained=0, back_s=1.0, wrong=())
    stopped = Finding(
        Cell("Postgres", Way.STOP, "stop", 20.0), 50, 40, 40, lost=40, unexplained=1, back_s=1.0, wrong=()
    )
    rows = table([clean, stopped])
    assert rows.splitlines()[2:] == [
        "| keeper | KILL |  | 50 | 5 | 5 | 5 of 5 |",
        "| Postgres | STOP, 20 s | `stop` | 50 | 40 | 40 | 39 of 40 |",
    ]
    page = f"before\n\n{MARK}| old |\n| --- |\n| row |\n\nafter | all\n"
    replaced = f"before\n\n{MARK}{rows}\nafter | all\n"
    assert with_table(page, rows) == with_table(replaced, rows) == replaced
    assert with_table(f"before\n\n{MARK}after | all\n", rows) == replaced
    with pytest.raises(ValueError, match="restarts"):
        with_table("no mark\n", rows)


async def test_a_cell_that_there_is_not_is_refused_and_all_are_named() -> None:
    told: list[str] = []
    assert await run_restarts(["agent HUP"], told.append) == 2
    assert "agent HUP" in told[0]
    assert "keeper KILL" in told[0]


# ── one replica after another ────────────────────────────────────────────────


@dataclass
class Leaders:
    """Who leads, as the database shows it."""

    vacant_s: list[float] = field(default_factory=list)
    """How long nobody led, each time."""
    terms: list[str] = field(default_factory=list)
    """Who led, one after the other."""

    async def watch(self, world: World) -> None:
        """Looks all the time, until cancelled."""
        since: float | None = None
        async with world.database() as connection:
            while True:
                holder = await connection.fetchval("SELECT holder FROM leader")
                now = time.monotonic()
                if not holder:
                    since = since or now
                    continue
                if since is not None:
                    self.vacant_s.append(now - since)
                    since = None
                if not self.terms or self.terms[-1] != holder:
                    self.terms.append(holder)
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(*works: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Runs coroutines beside a block; one that fails, fails it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
        yield
        for task in tasks:
            task.cancel()


async def ask(client: lessor.AsyncClient, job_id: str) -> None:
    """Asks one thing after the other, until cancelled; no answer may be an error."""
    while True:
        job = await client.get(job_id)
        assert (job.attempt, job.losses) == (1, 0)
        assert len(await client.agents()) == 3
        async for _ in client.list(limit=20):
            pass
        # Its own pace: the hosts' cores are for those that start.
        await asyncio.sleep(0.1)


async def read_log(client: lessor.AsyncClient, job_id: str) -> bytes:
    """Follows a job's output to its end."""
    return b"".join([chunk.data async for chunk in client.logs(job_id, follow=True)])


@pytest.mark.timeout(120)
async def test_replicas_restarted_one_by_one_twice_under_load() -> None:
    shape = Shape(agents=3, replicas=3, networks=False, cpus=2)
    seed = random.SystemRandom().randrange(1_000_000)
    with tempfile.TemporaryDirectory(prefix="lessor-rolling-", ignore_cleanup_errors=True) as directory:
        async with (
            running_world(Path(directory), shape, seed) as world,
            world.client() as submitting,
            world.client() as asking,
            world.client() as following,
        ):
            load, leaders = Load(world, submitting, random.Random(f"load {seed}")), Leaders()
            gate = world.directory / "gate"
            (long,) = await load.submit([Plan(seconds=1.0, lines=80, gate=str(gate))])
            long_id = encode_job_id(long.job_number)
            await until(lambda: any(world.diaries.glob("*.main")))
            waiting = asyncio.create_task(following.wait([long_id], timeout=90))
            following_log = asyncio.create_task(read_log(following, long_id))
            async with running(load.run(3, 2.0), ask(asking, long_id), leaders.watch(world)):
                for replica in world.replicas * 2:
                    begin_s = time.monotonic()
                    await replica.terminate()
                    assert replica.process is not None
                    assert replica.process.returncode == 0
                    print(f"seed {seed}: {replica.name} stopped in {time.monotonic() - begin_s:.2f} s")
                    replica.start()
                    await replica.listens()
            gate.touch()
            await asyncio.wait_for(load.settle(), 30)
            await come_to_rest(world, 30)
            history = await collect(world, load.submitted.values(), [])
            (ended,) = await waiting
            assert (ended.state, ended.attempt, ended.losses) == (lessor.JobState.SUCCEEDED, 1, 0)
            assert ended.lease_id is not None
            assert await following_log == printed(ended.lease_id, 80)
            # No fault is an excuse: whatever was lost would be a violation.
            assert not (violations := check(history)), [str(violation) for violation in violations]
            assert load.refused == 0
            outcomes = {row.outcome for row in history.attempts}
            assert outcomes <= {Outcome.SUCCEEDED, Outcome.FAILED, Outcome.CANCELLED}
            assert len(history.submitted) > 20
            assert len(leaders.terms) >= 3, "whoever led was restarted, twice"
            print(f"nobody led for {leaders.vacant_s} s; {len(history.submitted)} jobs")
            assert max(leaders.vacant_s) < HANDED_OVER_S
