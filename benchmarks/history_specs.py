"""What the jobs of a made-up past are, and what the server stores of each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from lessor.v1 import job_pb2
from lessor_server.services.submission import Submissions
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database

QUEUES = tuple(f"history-{number:02d}" for number in range(20))
NAMES = tuple(f"train-{number:03d}" for number in range(500))
TEAMS = ("vision", "speech", "language", "robots", "search")
RARE_LABEL = ("experiment", "rare")

RARE_EVERY = 100_000
"""About one finished job in so many has :data:`RARE_LABEL`."""

PAST_SPECS = 2_000
"""Different specs of the past, the rare one apart."""


def _spec(
    number: int, queue: str, *, memory_bytes: int, gpus: int = 0, experiment: str | None = None
) -> job_pb2.JobSpec:
    chance = random.Random(number)
    return job_pb2.JobSpec(
        queue=queue,
        name=chance.choice(NAMES),
        priority=chance.choice((0, 0, 0, 10, -10)),
        command=job_pb2.Command(argv=["/usr/bin/python3", "train.py", f"--seed={number}"]),
        resources=job_pb2.Resources(cpu_millis=1000, memory_bytes=memory_bytes, gpu_count=gpus),
        labels={"team": chance.choice(TEAMS), "experiment": experiment or f"e{chance.randrange(200)}"},
    )


def specs_of_the_past() -> list[job_pb2.JobSpec]:
    """Returns what the finished jobs were: :data:`PAST_SPECS`, and the rare one."""
    specs = [
        _spec(number, QUEUES[number % len(QUEUES)], memory_bytes=(1 + number // 20 % 4) << 10)
        for number in range(PAST_SPECS)
    ]
    return [*specs, _spec(PAST_SPECS, QUEUES[0], memory_bytes=1 << 10, experiment=RARE_LABEL[1])]


def specs_now(queues: Sequence[str], shapes: int, gpus: int) -> list[job_pb2.JobSpec]:
    """Returns specs of jobs to wait or run: every queue meets every shape, neighbours are of different queues."""
    return [
        _spec(number, queue, memory_bytes=(1 + shape) << 10, gpus=gpus)
        for number, (shape, queue) in enumerate(itertools.product(range(shapes), queues))
    ]


async def make_templates(url: str, specs: Sequence[job_pb2.JobSpec]) -> None:
    """Stores what is to be written of each spec, as the server would, in ``history_template`` by its index."""
    database = await Database.connect(url, pool_size=2)
    try:
        catalog = Catalog(database)
        rows = []
        for queue in {spec.queue for spec in specs}:
            await database.query("INSERT INTO queue (name) VALUES ($1) ON CONFLICT DO NOTHING", queue)
        for index, job in enumerate(await Submissions().prepare_all(specs, single=False)):
            terms = job.terms
            rows.append(
                (index, await catalog.queue_id(terms.queue), await catalog.shape_id(terms.shape), terms.priority,
                 job.name, job.labels_json, job.spec, terms.ttl_ms, terms.max_failures, terms.max_losses,
                 terms.backoff_initial_ms, terms.backoff_max_ms)
            )  # fmt: skip
        async with database.pool.acquire() as connection:
            await connection.execute(
                "CREATE TABLE history_template AS SELECT 0 AS id, queue_id, shape_id, priority, name, labels, spec, "
                "ttl_ms, max_failures, max_losses, backoff_initial_ms, backoff_max_ms FROM job LIMIT 0"
            )
            await connection.executemany(
                "INSERT INTO history_template VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)", rows
            )
            await connection.execute("ANALYZE history_template")
    finally:
        await database.close()
