"""The words and numbers of a reason: what is lacking where, and the smallest change that would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lessor.timing import HEARTBEATS_PER_TTL
from lessor_server.domain.shape import Shape
from lessor_server.planner.fit import Filter, Shortfall, idle_shortfalls
from lessor_server.planner.model import Agent
from lessor_server.planner.reasons import PendingReason, Reason

_NAMES_SHOWN = 5
_GPU_FILTERS = (Filter.GPUS, Filter.GPU_MODEL, Filter.GPU_MEMORY)
_EASE = (
    Filter.DRAINED,
    Filter.GPUS,
    Filter.MEMORY,
    Filter.CPU,
    Filter.GPU_MEMORY,
    Filter.GPU_MODEL,
    Filter.SELECTOR,
    Filter.HEARTBEAT,
    Filter.USER,
    Filter.RUNTIME,
)
"""Between remedies that change equally many things, the first named here is proposed."""


def count_of(count: int, noun: str) -> str:
    """Returns ``1 GPU``, ``2 GPUs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def cpus_text(millis: int) -> str:
    """Returns ``1 CPU``, ``0.25 CPUs``."""
    return "1 CPU" if millis == 1000 else f"{millis / 1000:.3f}".rstrip("0").rstrip(".") + " CPUs"


def bytes_text(size: int) -> str:
    """Returns ``80 GiB``, ``1.5 MiB``: exact when it has few digits, otherwise rounded down to two places."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    # Rounded down, since these are bounds of what may be asked for.
    return f"{int(value * 100) / 100:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def duration_text(ms: int) -> str:
    """Returns ``2.5 s`` or ``4 min``: what people read."""
    if ms >= 120_000:
        return f"{ms / 60_000:.1f}".rstrip("0").rstrip(".") + " min"
    return f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + " s"


def names_text(names: Iterable[str]) -> str:
    """Returns the first few names, and how many more there are."""
    listed = sorted(names)
    more = len(listed) - _NAMES_SHOWN
    return ", ".join(listed[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def running_limit_reason(queue: str, running: int, max_running: int) -> Reason:
    """Says that a queue has as many leases as it may."""
    change = f"raise max_running of queue '{queue}'"
    return Reason(
        PendingReason.QUEUE_LIMIT,
        f"queue '{queue}' runs {running} of at most {count_of(max_running, 'job')} (max_running)",
        change if max_running == 0 else f"wait for one of its jobs to end, or {change}",
        {"running": running, "max_running": max_running},
    )


def gpu_limit_reason(queue: str, gpus: int, max_gpus: int, needed: int) -> Reason:
    """Says that a queue may not hold the job's GPUs as well."""
    change = f"raise max_gpus of queue '{queue}' to at least {{}}"
    if needed > max_gpus:
        message = f"the job needs {count_of(needed, 'GPU')}, queue '{queue}' may hold at most {max_gpus} (max_gpus)"
        remedy = (f"ask for at most {count_of(max_gpus, 'GPU')}, or " if max_gpus else "") + change.format(needed)
    else:
        message = (
            f"queue '{queue}' holds {gpus} of at most {count_of(max_gpus, 'GPU')} (max_gpus), the job needs {needed}"
        )
        remedy = "wait for one of its jobs to end, or " + change.format(gpus + needed)
    return Reason(
        PendingReason.QUEUE_LIMIT, message, remedy, {"gpus": gpus, "max_gpus": max_gpus, "gpus_needed": needed}
    )


def no_agent_reason(fleet: Sequence[Agent]) -> Reason:
    """Says that no agent is connected."""
    if not fleet:
        return Reason(
            PendingReason.NO_AGENT_CONNECTED, "no agent has ever connected", "start an agent", {"agents_known": 0}
        )
    names = names_text(agent.name for agent in fleet)
    return Reason(
        PendingReason.NO_AGENT_CONNECTED,
        f"none of {count_of(len(fleet), 'known agent')} is connected ({names})",
        "start one of them, or another agent",
        {"agents_known": len(fleet)},
    )


def no_runtime_reason(fleet: Sequence[Agent], shape: Shape) -> Reason:
    """Says that no connected agent has the runtime, and which there are."""
    connected = [agent for agent in fleet if agent.fresh]
    present = sorted(set().union(*(agent.runtimes for agent in connected)))
    choose = f", or use one there is ({', '.join(present)})" if present else ""
    none_has = (
        f"the only connected agent ({connected[0].name}) does not have"
        if len(connected) == 1
        else f"none of {len(connected)} connected agents has"
    )
    return Reason(
        PendingReason.NO_AGENT_WITH_RUNTIME,
        f"{none_has} runtime '{shape.runtime}'{_disconnected(fleet, shape)[0]}",
        f"start an agent with runtime '{shape.runtime}'{choose}",
        {"agents": len(connected), **_disconnected(fleet, shape)[1]},
    )


def never_fits_reason(fleet: Sequence[Agent], shape: Shape) -> Reason:
    """Says what each connected agent lacks, counted by the first thing it lacks."""
    lacking = [(agent, idle_shortfalls(agent, shape)) for agent in fleet if agent.fresh]
    counts = Counter(_lack_text(found[0], shape) for _, found in lacking)
    drained = [agent.name for agent, found in lacking if found[0].filter is Filter.DRAINED]
    parts = [
        f"{count} {(singular if count == 1 else plural)}"
        + (f" ({names_text(drained)})" if singular == "is drained" else "")
        for (singular, plural), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    more, more_numbers = _disconnected(fleet, shape)
    remedy, remedy_numbers = _idle_remedy(lacking, shape)
    numbers = {"agents": len(lacking), "agents_fitting": 0, **more_numbers, **remedy_numbers}
    for first, count in Counter(found[0].filter for _, found in lacking).items():
        numbers[f"lacking_{first}"] = count
    return Reason(
        PendingReason.NO_AGENT_FITS_EVER,
        f"0 of {count_of(len(lacking), 'agent')} {'fits' if len(lacking) == 1 else 'fit'}: {', '.join(parts)}{more}",
        remedy,
        numbers,
    )


def busy_reason(
    fleet: Sequence[Agent], shape: Shape, lacking: Sequence[tuple[str, Sequence[Shortfall]]], ahead: int
) -> Reason:
    """Says which agents fit when idle and what each lacks now.

    Args:
        fleet: All known agents.
        shape: The job's.
        lacking: (name, what it lacks now) of every agent that fits when idle.
        ahead: Waiting jobs that go first.
    """
    # Fewest things lacking first; of equals, the one that lacks the least of the first.
    nearest = sorted(lacking, key=lambda item: (len(item[1]), item[1][0].filter, -item[1][0].available, item[0]))
    told = [f"{name} has {' and '.join(map(_busy_text, found))}" for name, found in nearest[:_NAMES_SHOWN]]
    rest = len(nearest) - len(told)
    fits = (
        "1 agent fits but has no room now" if len(lacking) == 1 else f"{len(lacking)} agents fit but have no room now"
    )
    message = f"{fits}: {'; '.join(told)}" + (f"; and {rest} more" if rest else "")
    if ahead:
        message += f"; {count_of(ahead, 'job')} {'goes' if ahead == 1 else 'go'} first"
    idle_drained = [
        agent.name
        for agent in fleet
        if agent.fresh and [found.filter for found in idle_shortfalls(agent, shape)] == [Filter.DRAINED]
    ]
    if idle_drained:
        message += f"; {names_text(idle_drained)} would fit but {'is' if len(idle_drained) == 1 else 'are'} drained"
    numbers = {"agents_fitting": len(lacking), "agents_drained_fitting": len(idle_drained), "jobs_ahead": ahead}
    if shape.gpu_count:
        free = max(
            (found.available for _, lacks in lacking for found in lacks if found.filter is Filter.GPUS), default=0
        )
        numbers |= {"gpus_needed": shape.gpu_count, "gpus_free_at_most": free}
    remedy, remedy_numbers = _busy_remedy(nearest)
    return Reason(PendingReason.FITS_BUT_BUSY, message, remedy, numbers | remedy_numbers)


def _busy_text(found: Shortfall) -> str:
    match found.filter:
        case Filter.CPU:
            return f"{cpus_text(found.available)} free of the {cpus_text(found.needed)} needed"
        case Filter.MEMORY:
            return f"{bytes_text(found.available)} of memory free of the {bytes_text(found.needed)} needed"
        case Filter.OFFERS:
            return "as many offers to accept as it may have"
        case _:
            return f"{found.available} of the {count_of(found.needed, 'GPU')} needed free"


def _busy_remedy(nearest: Sequence[tuple[str, Sequence[Shortfall]]]) -> tuple[str, dict[str, int]]:
    """Returns what to ask for instead to start now, on the agent that lacks least."""
    for name, found in nearest:
        if all(lack.filter is not Filter.OFFERS and lack.available > 0 for lack in found):
            asks: list[str] = []
            numbers: dict[str, int] = {}
            for lack in found:
                text, lack_numbers = _smaller_ask(lack)
                asks.append(text)
                numbers |= lack_numbers
            return f"wait for a lease to end, or ask for at most {' and '.join(asks)} to start on {name} now", numbers
    return "wait for a lease to end, or add an agent", {}


def _smaller_ask(found: Shortfall) -> tuple[str, dict[str, int]]:
    match found.filter:
        case Filter.CPU:
            return cpus_text(found.available), {"cpu_millis_at_most": found.available}
        case Filter.MEMORY:
            return f"{bytes_text(found.available)} of memory", {"memory_bytes_at_most": found.available}
        case _:
            return count_of(found.available, "GPU"), {"gpus_at_most": found.available}


def _lack_text(found: Shortfall, shape: Shape) -> tuple[str, str]:
    """Returns the predicates of one agent and of several that lack this."""
    gpus = count_of(shape.gpu_count, "GPU")
    match found.filter:
        case Filter.RUNTIME:
            return (f"does not have runtime '{shape.runtime}'", f"do not have runtime '{shape.runtime}'")
        case Filter.SELECTOR:
            return (f"does not match selector {found.selector}", f"do not match selector {found.selector}")
        case Filter.GPUS:
            lack = "no GPU" if shape.gpu_count == 1 else f"fewer than {gpus}"
        case Filter.GPU_MODEL:
            lack = f"fewer than {gpus} of model '{shape.gpu_model}'"
        case Filter.GPU_MEMORY:
            of_model = f" of model '{shape.gpu_model}'" if shape.gpu_model else ""
            lack = f"fewer than {gpus}{of_model} with {bytes_text(shape.gpu_memory_bytes)} of memory"
        case Filter.CPU:
            lack = f"fewer than {cpus_text(shape.cpu_millis)}"
        case Filter.MEMORY:
            lack = f"less than {bytes_text(shape.memory_bytes)} of memory"
        case Filter.USER:
            lack = f"a runtime '{shape.runtime}' that cannot run jobs as another user"
        case Filter.HEARTBEAT:
            lack = f"a heartbeat interval over {duration_text(shape.max_heartbeat_ms)}"
        case Filter.DRAINED:
            return ("is drained", "are drained")
        case Filter.OFFERS:
            lack = "as many offers to accept as it may have"
    return (f"has {lack}", f"have {lack}")


def _disconnected(fleet: Sequence[Agent], shape: Shape) -> tuple[str, dict[str, int]]:
    """Returns a clause on agents that would fit were they connected, and its number."""
    names = [agent.name for agent in fleet if not agent.fresh and not idle_shortfalls(agent, shape)]
    if not names:
        return "", {"agents_disconnected_fitting": 0}
    clause = f"; {names_text(names)} would fit but {'is' if len(names) == 1 else 'are'} not connected"
    return clause, {"agents_disconnected_fitting": len(names)}


def _idle_remedy(lacking: Sequence[tuple[Agent, Sequence[Shortfall]]], shape: Shape) -> tuple[str, dict[str, int]]:
    """Returns the change that lets the agent nearest to fitting take the job, and its numbers."""

    def distance(item: tuple[Agent, Sequence[Shortfall]]) -> tuple[object, ...]:
        agent, found = item
        ranks = sorted(_EASE.index(lack.filter) for lack in found)
        # Of agents that lack the same things, the one that lacks the least of them.
        gaps = [
            -max(lack.available, lack.gpus) if lack.filter is not Filter.HEARTBEAT else lack.available for lack in found
        ]
        memory = [-(lack.gpu_memory_bytes or 0) for lack in found]
        return (len(found), ranks, gaps, memory, agent.agent_id)

    agent, found = min(lacking, key=distance)
    asks: list[str] = []
    numbers: dict[str, int] = {}
    for lack in found:
        text, lack_numbers = _idle_change(lack, agent, shape)
        asks.append(text)
        numbers |= lack_numbers
    return " and ".join(asks), numbers


def _idle_change(found: Shortfall, agent: Agent, shape: Shape) -> tuple[str, dict[str, int]]:
    """Returns the change that makes up for one shortfall on ``agent``."""
    match found.filter:
        case Filter.RUNTIME:
            present = ", ".join(sorted(agent.runtimes))
            return f"add runtime '{shape.runtime}' to agent {agent.name}" + (
                f" or use {present}" if present else ""
            ), {}
        case Filter.SELECTOR:
            return f"drop selector {found.selector}", {}
        case Filter.USER:
            return f"leave out the user, or run agent {agent.name} as root", {}
        case Filter.HEARTBEAT:
            ttl_ms = found.available * HEARTBEATS_PER_TTL
            return f"use a ttl of at least {duration_text(ttl_ms)}", {"ttl_ms_at_least": ttl_ms}
        case Filter.DRAINED:
            return f"undrain agent {agent.name}", {}
        case Filter.CPU | Filter.MEMORY:
            text, numbers = _smaller_ask(found)
            return f"ask for at most {text}", numbers
        case Filter.GPUS if not found.available:
            return f"add an agent with {count_of(found.needed, 'GPU')}", {}
        case Filter.GPUS:
            return f"ask for at most {count_of(found.available, 'GPU')}", {"gpus_at_most": found.available}
        case _:
            return _gpu_kind_change(found, agent, shape)


def _gpu_kind_change(found: Shortfall, agent: Agent, shape: Shape) -> tuple[str, dict[str, int]]:
    """Returns the change for GPUs of the wrong model or with too little memory: fewer of them, or other ones."""
    asks: list[str] = []
    numbers: dict[str, int] = {}
    least = shape.gpu_memory_bytes if found.gpu_memory_bytes is None else found.gpu_memory_bytes
    if found.filter is Filter.GPU_MODEL:
        models = ", ".join(sorted({gpu.model for gpu in agent.gpus if gpu.memory_bytes >= least}))
        asks.append(f"another GPU model ({agent.name} has {models})")
    if found.gpu_memory_bytes is not None:
        asks.append(f"at most {bytes_text(least)} of memory per GPU")
        numbers["gpu_memory_bytes_at_most"] = least
    if found.gpus < found.needed:
        asks.append(f"at most {count_of(found.gpus, 'GPU')}")
        numbers["gpus_at_most"] = found.gpus
    other = " and ".join(asks)
    if not found.available:
        return f"ask for {other}", numbers
    # Fewer GPUs alone would do, so theirs is the number to tell.
    fewer = f"ask for at most {count_of(found.available, 'GPU')}"
    return fewer + (f", or for {other}" if found.gpus else ""), {"gpus_at_most": found.available}
