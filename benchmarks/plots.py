"""Plots of results, for the docs: one PNG per scenario, the same bytes for the same results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Cell, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Cell]

_OURS, _LIMIT, _THEIRS = "#2b6cb0", "#a0aec0", "#dd8452"
_WIDTH_IN = 8.0
_BAR_IN = 0.42
_DPI = 120


def draw(results: Sequence[Result], directory: Path) -> list[Path]:
    """Writes ``<scenario>.png`` for each scenario that has something to plot; returns their paths.

    Without matplotlib it says so on standard error, and writes nothing.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        print("plots: left out: matplotlib is not installed (extra 'bench')", file=sys.stderr)
        return []
    found = {result.scenario: result for result in results}
    written = []
    for name, plot in _PLOTS.items():
        if name not in found:
            continue
        with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            figure = plot(found)
            if figure is None:
                continue
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{name}.png"
            # Without the name and version of the program that drew it.
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})
            written.append(path)
    return written


# ---------------------------------------------------------------- scenarios


def _drain(found: Mapping[str, Result]) -> Figure | None:
    """Jobs per second: the bare store, Lessor with its fleets, and the peers of the same run."""
    bars: list[tuple[str, float, str]] = []
    for row in found["drain"].rows:
        agents = row.get("agents")
        label = str(row["what"]) if agents is None else f"Lessor, {row['what']}, {agents} agents"
        bars.append((label, _number(row["jobs/s"]), _LIMIT if agents is None else _OURS))
    if (peers := found.get("peers")) is not None:
        bars.extend((str(row["peer"]), _number(row["drained jobs/s"]), _THEIRS) for row in peers.rows)
    if not bars:
        return None
    figure, (axes,) = _figure([_bars_in(len(bars))])
    _bars(axes, bars, "no-op jobs per second")
    return figure


def _growth(found: Mapping[str, Result]) -> Figure | None:
    """Jobs per second of each case, and claims over time while a transaction stays open."""
    rows = found["growth"].rows
    drains = [row for row in rows if "jobs/s" in row]
    held = [row for row in rows if "claim p50 ms" in row]
    if not drains:
        return None
    figure, axes = _figure([_bars_in(len(drains)), *([2.4] if held else [])])
    _bars(axes[0], [(str(row["what"]), _number(row["jobs/s"]), _OURS) for row in drains], "no-op jobs per second")
    if held:
        labels = list(dict.fromkeys(str(row["what"]) for row in held))
        for label, colour in zip(labels, (_LIMIT, _OURS), strict=False):
            own = [row for row in held if row["what"] == label]
            ends = [float(str(row["seconds"]).split()[-1]) for row in own]
            axes[1].plot(ends, [_number(row["claim p50 ms"]) for row in own], "o-", color=colour, label=f"{label}, p50")
            axes[1].plot(ends, [_number(row["claim p99 ms"]) for row in own], "o:", color=colour, label=f"{label}, p99")
        axes[1].set_ylim(bottom=0)
        axes[1].set_xlabel("seconds since the load began")
        axes[1].set_ylabel("claim, ms")
        axes[1].legend(frameon=False)
    return figure


def _idle_fleet(found: Mapping[str, Result]) -> Figure | None:
    """CPU and memory over the number of agents."""
    rows = [row for row in found["idle_fleet"].rows if "agents" in row]
    if not rows:
        return None
    agents = [_number(row["agents"]) for row in rows]
    figure, (cpu, memory) = _figure([2.4, 2.0])
    for column, colour in (("server cores", _OURS), ("postgres cores", _THEIRS)):
        cpu.plot(agents, [_number(row.get(column)) for row in rows], "o-", color=colour, label=column)
    cpu.set_ylabel("CPU cores in use")
    cpu.legend(frameon=False)
    memory.plot(agents, [_number(row.get("server KB/agent")) for row in rows], "o-", color=_OURS)
    memory.set_ylabel("server KB per agent")
    memory.set_xlabel("connected agents")
    for axes in (cpu, memory):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    return figure


def _latency(found: Mapping[str, Result]) -> Figure | None:
    """p50 and p99 of what a single job waits for on an idle system, and the peers' starts of the same run."""
    kinds = [
        (f"Lessor, {row['what']}", _number(row["p50 ms"]), _number(row["p99 ms"]), _OURS)
        for row in found["latency"].rows
        if "p50 ms" in row and not str(row["what"]).startswith("of it")
    ]
    if (peers := found.get("peers")) is not None:
        kinds.extend(
            (f"{row['peer']}, start", _number(row["start p50 ms"]), _number(row["start p99 ms"]), _THEIRS)
            for row in peers.rows
        )
    if not kinds:
        return None
    figure, (axes,) = _figure([_bars_in(len(kinds))])
    places = range(len(kinds))
    axes.barh(places, [p99 for _, _, p99, _ in kinds], color=[colour for *_, colour in kinds], alpha=0.35)
    axes.barh(places, [p50 for _, p50, _, _ in kinds], color=[colour for *_, colour in kinds])
    for place, (_, p50, p99, _) in enumerate(kinds):
        axes.text(max(p50, p99), place, f"  {p50:.1f} / {p99:.1f}", va="center")
    axes.set_yticks(places, [label for label, *_ in kinds])
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=1)
    axes.margins(x=0.2)
    axes.set_xlabel("milliseconds, p50 (dark) and p99 (light)")
    return figure


_PLOTS: dict[str, Callable[[Mapping[str, Result]], Figure | None]] = {
    "drain": _drain,
    "growth": _growth,
    "idle_fleet": _idle_fleet,
    "latency": _latency,
}

# ---------------------------------------------------------------- parts


def _figure(heights_in: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Returns a figure with axes of these heights, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, sum(heights_in) + 0.5), layout="constrained")
    grid = figure.subplots(len(heights_in), 1, squeeze=False, height_ratios=list(heights_in))
    return figure, [row[0] for row in grid]


def _bars_in(bars: int) -> float:
    return max(1.6, _BAR_IN * bars)


def _bars(axes: Axes, bars: Sequence[tuple[str, float, str]], unit: str) -> None:
    """Draws (label, value, colour) from top to bottom, each with its value."""
    places = range(len(bars))
    axes.barh(places, [value for _, value, _ in bars], color=[colour for *_, colour in bars])
    for place, (_, value, _) in enumerate(bars):
        axes.text(value, place, f" {value:,.0f}", va="center")
    axes.set_yticks(places, [label for label, *_ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(unit)


def _number(cell: Cell) -> float:
    """Returns a cell as a number; NaN, which leaves a gap, where it is none."""
    return float(cell) if isinstance(cell, int | float) else float("nan")
