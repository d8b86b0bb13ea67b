"""What a scenario found: rows of a table, figures and ratios, as text and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float | None


@dataclass
class Result:
    """What one scenario found."""

    scenario: str
    title: str
    rows: list[dict[str, Cell]] = field(default_factory=list)
    """Rows of the table, column → cell. A row that shares but its first column with those before it begins another."""
    figures: dict[str, float] = field(default_factory=dict)
    """Name with unit → value, such as ``submit_to_running_p50_ms``. They depend on the machine."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Name → ratio of two figures of the same run: what can be compared between machines and days."""
    bounds: dict[str, str] = field(default_factory=dict)
    """Name of a figure or ratio → what it is to be, such as ``>= 0.5``."""
    notes: list[str] = field(default_factory=list)
    """What was left out and why, and how to read the table."""

    def bound(self, name: str, value: float, wanted: str, *, ratio: bool = False) -> None:
        """Notes a figure (or ratio) together with what it is to be, as ``>= N`` or ``<= N``."""
        (self.ratios if ratio else self.figures)[name] = value
        self.bounds[name] = wanted

    def held(self, name: str) -> bool:
        """Returns whether a bound is held."""
        relation, _, limit = self.bounds[name].partition(" ")
        value = self.ratios.get(name, self.figures.get(name, float("nan")))
        return value >= float(limit) if relation == ">=" else value <= float(limit)

    def json_line(self) -> str:
        """Returns the result as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True, default=str)

    def text(self) -> str:
        """Returns the result as a table with its bounds and notes below."""
        parts = [f"{self.scenario}: {self.title}"]
        parts.extend(_table(rows) for rows in _tables(self.rows))
        for name in self.bounds:
            value = self.ratios.get(name, self.figures.get(name, float("nan")))
            verdict = "held" if self.held(name) else "MISSED"
            parts.append(f"  {name} = {_cell(value)}, wanted {self.bounds[name]}: {verdict}")
        parts += [f"  note: {note}" for note in self.notes]
        return "\n".join(parts)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value below which ``share`` (0 … 1) of the values lie; NaN of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """Returns the median; NaN of none."""
    return statistics.median(values) if values else float("nan")


def read_committed(path: Path) -> dict[str, float]:
    """Returns the ratios of an earlier run, ``scenario.name`` → ratio; empty where there is no file."""
    if not path.exists():
        return {}
    found: dict[str, float] = json.loads(path.read_text())["ratios"]
    return found


def write_ratios(path: Path, results: Iterable[Result], environment: Mapping[str, Any]) -> None:
    """Writes the ratios and figures of a run, to be committed and compared with later ones."""
    results = list(results)
    ratios = {f"{r.scenario}.{name}": round(value, 3) for r in results for name, value in r.ratios.items()}
    figures = {f"{r.scenario}.{name}": round(value, 3) for r in results for name, value in r.figures.items()}
    document = {"environment": dict(environment), "ratios": ratios, "figures": figures}
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def merge_ratios(path: Path, results: Iterable[Result], environment: Mapping[str, Any]) -> None:
    """As :func:`write_ratios`, keeping what an earlier run found of other scenarios."""
    before = json.loads(path.read_text()) if path.exists() else {"ratios": {}, "figures": {}}
    results = list(results)
    again = tuple(f"{result.scenario}." for result in results)
    write_ratios(path, results, environment)
    document = json.loads(path.read_text())
    for kind in ("ratios", "figures"):
        kept = {name: value for name, value in before[kind].items() if not name.startswith(again)}
        document[kind] = {**kept, **document[kind]}
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def compare(results: Iterable[Result], committed: Mapping[str, float]) -> str:
    """Returns the ratios of this run beside earlier ones, as a table."""
    rows: list[dict[str, Cell]] = []
    for result in results:
        for name, value in result.ratios.items():
            before = committed.get(f"{result.scenario}.{name}")
            change = value / before if before else None
            rows.append(
                {
                    "ratio": f"{result.scenario}.{name}",
                    "now": value,
                    "committed": before,
                    "now / committed": change,
                }
            )
    return _table(rows) if rows else "no ratios"


def _tables(rows: Iterable[dict[str, Cell]]) -> list[list[dict[str, Cell]]]:
    """Returns the rows by table."""
    tables: list[list[dict[str, Cell]]] = []
    columns: set[str] = set()
    for row in rows:
        first, *others = row
        if not tables or (others and columns - {first} and columns.isdisjoint(others)):
            tables.append([])
            columns = set()
        tables[-1].append(row)
        columns.update(row)
    return tables


def _table(rows: Sequence[Mapping[str, Cell]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    texts = [
        "  " + "  ".join(cell.ljust(width) if number == 0 else cell.rjust(width) for number, (cell, width) in pairs)
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    ]
    return "\n".join([texts[0].rstrip(), "  " + "  ".join("-" * width for width in widths), *texts[1:]])


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if value != value:
            return "-"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
