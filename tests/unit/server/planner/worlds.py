"""Random small worlds for the planner, and the planner's rules written the slow, plain way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from lessor_server.domain.shape import Selector, SelectorOperator, Shape
from lessor_server.domain.states import JobState
from lessor_server.planner.explain import Subject
from lessor_server.planner.model import Agent, Candidate, Gpu, Grant, Group, Policy, Queue

GIB = 1 << 30
H200, A100 = "NVIDIA H200", "NVIDIA A100-SXM4-40GB"

BASE_SHAPE = Shape(
    cpu_millis=1000,
    memory_bytes=0,
    gpu_count=0,
    gpu_model="",
    gpu_memory_bytes=0,
    selectors=(),
    runtime="process",
    max_heartbeat_ms=15_000,
    needs_user=False,
)


def make_gpus(agent: str, count: int, model: str = H200, memory_gib: int = 141) -> tuple[Gpu, ...]:
    """Returns ``count`` GPUs of one kind, named after the agent."""
    return tuple(Gpu(f"GPU-{agent}-{index}", index, model, memory_gib * GIB) for index in range(count))


BASE_AGENT = Agent(
    agent_id="agent-a1",
    name="a1",
    session_id=11,
    epoch=3,
    labels={"zone": "a"},
    runtimes=frozenset({"process"}),
    can_set_user=frozenset({"process"}),
    heartbeat_ms=5000,
    cpu_millis=16_000,
    memory_bytes=64 * GIB,
    gpus=(),
    fresh=True,
    drained=False,
)


def make_agent(name: str, gpus: int | tuple[Gpu, ...] = 0, **changes: object) -> Agent:
    """Returns a connected, idle agent with 16 CPUs and 64 GiB."""
    listed = make_gpus(name, gpus) if isinstance(gpus, int) else gpus
    return replace(BASE_AGENT, agent_id=f"agent-{name}", name=name, gpus=listed, **changes)  # type: ignore[arg-type]


def make_shape(gpus: int = 0, **changes: object) -> Shape:
    """Returns a shape of one CPU and ``gpus`` GPUs on the process runtime."""
    return replace(BASE_SHAPE, gpu_count=gpus, **changes)  # type: ignore[arg-type]


def make_group(shape: Shape, *jobs: int, queue_id: int = 1, shape_id: int = 1, priority: int = 0) -> Group:
    """Returns a group of jobs whose ids are also their ages."""
    return Group(queue_id, shape_id, shape, tuple(Candidate(job, priority, job) for job in jobs), len(jobs))


@dataclass(frozen=True)
class World:
    """A planner's input."""

    fleet: tuple[Agent, ...]
    groups: tuple[Group, ...]
    queues: Mapping[int, Queue]
    policy: Policy

    def subject(self, group: Group, candidate: Candidate) -> Subject:
        """Returns a waiting job of this world as the explainer takes it."""
        return Subject(
            candidate.job_id,
            JobState.QUEUED,
            group.queue_id,
            group.shape_id,
            group.shape,
            candidate.priority,
            candidate.seq,
        )


@st.composite
def agents(draw: st.DrawFn, number: int) -> Agent:
    """An agent, often usable, with some of it in use, sometimes more than it has."""
    name = f"a{number}"
    kinds = draw(st.lists(st.sampled_from([(H200, 141), (A100, 40), (A100, 80)]), max_size=4))
    indices = draw(st.permutations(range(len(kinds))))
    gpus = tuple(
        Gpu(f"GPU-{name}-{position}", index, model, gib * GIB)
        for position, (index, (model, gib)) in enumerate(zip(indices, kinds, strict=True))
    )
    runtimes = draw(st.sampled_from([frozenset({"process"}), frozenset({"process", "docker"}), frozenset[str]()]))
    return make_agent(
        name,
        gpus,
        session_id=number + 100,
        epoch=draw(st.integers(1, 3)),
        labels=draw(st.sampled_from([{}, {"zone": "a"}, {"zone": "b"}, {"zone": "a", "spot": ""}])),
        runtimes=runtimes,
        can_set_user=draw(st.sampled_from([runtimes, frozenset[str]()])),
        heartbeat_ms=draw(st.sampled_from([2500, 5000, 30_000])),
        cpu_millis=draw(st.sampled_from([2000, 4000])),
        memory_bytes=draw(st.sampled_from([4, 8])) * GIB,
        fresh=draw(st.integers(0, 6)) > 0,
        drained=draw(st.integers(0, 6)) == 0,
        offers=draw(st.integers(0, 2)),
        cpu_millis_used=draw(st.sampled_from([0, 0, 500, 4000])),
        memory_bytes_used=draw(st.sampled_from([0, 0, 2, 8])) * GIB,
        gpus_used=frozenset(draw(st.lists(st.sampled_from([gpu.uuid for gpu in gpus] or ["GPU-gone"]), max_size=2))),
    )


selectors = st.lists(
    st.sampled_from(
        [
            Selector("zone", SelectorOperator.IN, ("a",)),
            Selector("zone", SelectorOperator.NOT_IN, ("b",)),
            Selector("spot", SelectorOperator.EXISTS),
            Selector("spot", SelectorOperator.NOT_EXISTS),
        ]
    ),
    max_size=2,
).map(tuple)

shapes = st.builds(
    Shape,
    cpu_millis=st.sampled_from([0, 250, 1000, 3000]),
    memory_bytes=st.sampled_from([0, 0, GIB, 6 * GIB]),
    gpu_count=st.sampled_from([0, 0, 1, 1, 2, 3]),
    gpu_model=st.sampled_from(["", "", "h200", "A100", "b300"]),
    gpu_memory_bytes=st.sampled_from([0, 0, 80 * GIB, 200 * GIB]),
    selectors=st.just(()) | selectors,
    runtime=st.sampled_from(["process", "process", "process", "docker"]),
    max_heartbeat_ms=st.sampled_from([15_000, 15_000, 2500]),
    needs_user=st.sampled_from([False, False, True]),
)


@st.composite
def busy_fleets(draw: st.DrawFn) -> tuple[Agent, ...]:
    """One to three agents of 4 GPUs that can take any process job but are mostly in use."""
    fleet = []
    for number in range(draw(st.integers(1, 3))):
        taken = draw(st.integers(1, 4))
        gpus_used = frozenset(f"GPU-a{number}-{index}" for index in range(taken))
        fleet.append(
            make_agent(
                f"a{number}",
                4,
                cpu_millis_used=16_000 - draw(st.sampled_from([0, 500, 2000, 16_000])),
                memory_bytes_used=(64 - draw(st.sampled_from([0, 1, 8, 64]))) * GIB,
                gpus_used=gpus_used,
                offers=draw(st.integers(0, 3)),
            )
        )
    return tuple(fleet)


@st.composite
def worlds(draw: st.DrawFn, max_jobs: int = 14) -> World:
    """A world of up to 5 agents, 2 queues and 4 shapes."""
    fleet = tuple(draw(agents(number)) for number in range(draw(st.integers(0, 5))))
    limits = st.none() | st.integers(0, 6)
    queues = {
        queue_id: Queue(
            queue_id,
            f"q{queue_id}",
            paused=draw(st.integers(0, 7)) == 0,
            max_running=draw(limits),
            max_gpus=draw(limits),
            running=draw(st.integers(0, 2)),
            gpus=draw(st.integers(0, 2)),
        )
        for queue_id in (1, 2)
    }
    known = draw(st.lists(shapes, min_size=1, max_size=4, unique=True))
    waiting: dict[tuple[int, int], list[Candidate]] = {}
    for job_id in range(1, draw(st.integers(0, max_jobs)) + 1):
        key = (draw(st.sampled_from([1, 2])), draw(st.integers(0, len(known) - 1)))
        waiting.setdefault(key, []).append(Candidate(job_id, draw(st.sampled_from([0, 0, 5])), job_id))
    groups = tuple(
        Group(queue_id, index, known[index], tuple(sorted(jobs, key=lambda job: job.order)), len(jobs))
        for (queue_id, index), jobs in waiting.items()
    )
    return World(fleet, groups, queues, Policy(max_offers=draw(st.integers(1, 4))))


def plain_plan(world: World) -> list[Grant]:
    """Returns the grants by the rules as they are written: every job in order, every agent looked at for each."""
    fleet = sorted(world.fleet, key=lambda agent: agent.agent_id)
    cpu = {agent.agent_id: agent.cpu_millis - agent.cpu_millis_used for agent in fleet}
    memory = {agent.agent_id: agent.memory_bytes - agent.memory_bytes_used for agent in fleet}
    free = {agent.agent_id: [gpu for gpu in agent.gpus if gpu.uuid not in agent.gpus_used] for agent in fleet}
    offers = {agent.agent_id: agent.offers for agent in fleet}
    running = {queue.queue_id: queue.running for queue in world.queues.values()}
    gpus = {queue.queue_id: queue.gpus for queue in world.queues.values()}
    jobs = sorted(((job, group) for group in world.groups for job in group.candidates), key=lambda item: item[0].order)
    grants = []
    for job, group in jobs:
        shape, queue = group.shape, world.queues[group.queue_id]
        if (
            queue.paused
            or (queue.max_running is not None and running[queue.queue_id] + 1 > queue.max_running)
            or (
                shape.gpu_count
                and queue.max_gpus is not None
                and gpus[queue.queue_id] + shape.gpu_count > queue.max_gpus
            )
        ):
            continue
        places = []
        for agent in fleet:
            key = agent.agent_id
            matching = matching_gpus(free[key], shape)
            if (
                can_ever(agent, shape)
                and offers[key] < world.policy.max_offers
                and len(matching) >= shape.gpu_count
                and (not shape.cpu_millis or cpu[key] >= shape.cpu_millis)
                and (not shape.memory_bytes or memory[key] >= shape.memory_bytes)
            ):
                left = len(matching) - shape.gpu_count
                places.append((left, cpu[key] - shape.cpu_millis, memory[key] - shape.memory_bytes, key, agent))
        if not places:
            continue
        agent = min(places, key=lambda place: place[:4])[4]
        key = agent.agent_id
        chosen = matching_gpus(free[key], shape)[: shape.gpu_count]
        free[key] = [gpu for gpu in free[key] if gpu not in chosen]
        cpu[key] -= shape.cpu_millis
        memory[key] -= shape.memory_bytes
        offers[key] += 1
        running[queue.queue_id] += 1
        gpus[queue.queue_id] += shape.gpu_count
        uuids = tuple(gpu.uuid for gpu in sorted(chosen, key=lambda gpu: gpu.index))
        grants.append(Grant(job.job_id, group.queue_id, group.shape_id, key, agent.session_id, agent.epoch, uuids))
    return grants


def matching_gpus(gpus: Sequence[Gpu], shape: Shape) -> list[Gpu]:
    """Returns the GPUs that would do, in the order they are taken."""
    would_do = [
        gpu
        for gpu in gpus
        if shape.gpu_model.lower() in gpu.model.lower() and gpu.memory_bytes >= shape.gpu_memory_bytes
    ]
    return sorted(would_do, key=lambda gpu: (gpu.memory_bytes, gpu.index))


def can_ever(agent: Agent, shape: Shape) -> bool:
    """Returns whether the agent, as connected and drained as it is, could take the shape when idle."""
    return (
        agent.fresh
        and not agent.drained
        and shape.runtime in agent.runtimes
        and (not shape.needs_user or shape.runtime in agent.can_set_user)
        and agent.heartbeat_ms <= shape.max_heartbeat_ms
        and all(selector.matches(agent.labels) for selector in shape.selectors)
        and agent.cpu_millis >= shape.cpu_millis
        and agent.memory_bytes >= shape.memory_bytes
        and len(matching_gpus(agent.gpus, shape)) >= shape.gpu_count
    )
