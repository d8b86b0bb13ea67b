"""What commands print: tables on a terminal, tab-separated lines in a pipe, JSON on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from lessor.sdk.wire import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

MISSING = "-"
"""Stands for a value that is not there."""


@dataclass(frozen=True, slots=True)
class Output:
    """Standard output in one of its three forms."""

    json: bool
    """One JSON document, or one per line for streams."""
    terminal: bool
    """People look at it, and it is not JSON."""

    @classmethod
    def to_stdout(cls, json: bool) -> Output:
        """Returns the form for the process's standard output."""
        return cls(json, sys.stdout.isatty() and not json)

    def document(self, value: Any) -> None:
        """Prints ``value`` as the one JSON document of a command."""
        print(json.dumps(plain(value), indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))

    def line(self, value: Any) -> None:
        """Prints ``value`` as one line of JSON lines, at once."""
        print(json.dumps(plain(value), ensure_ascii=False), flush=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "") -> None:
        """Prints rows: a table with a head on a terminal, lines with tabs and no head in a pipe.

        Args:
            columns: The head.
            rows: Cells; None is shown as ``-``.
            empty: Printed on a terminal when there are no rows.
        """
        cells = [[one_line(cell) for cell in row] for row in rows]
        if not self.terminal:
            for row in cells:
                print("\t".join(row))
        elif cells:
            from rich.console import Console

            console = Console()
            shown = columns_that_fit(columns, cells, console.width)
            console.print(self.render(columns[:shown], [row[:shown] for row in cells]))
        elif empty:
            print(empty)

    def render(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> RenderableType:
        """Returns rows as a table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, column in enumerate(columns):
            # An id that is cut cannot be copied.
            table.add_column(column, no_wrap=True, overflow="fold" if index == 0 else "ellipsis")
        for row in rows:
            cells = [one_line(cell) for cell in row]
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
        return table

    def fields(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Prints one name and value per line, those that are None left out."""
        shown = [(name, one_line(value)) for name, value in pairs if value is not None]
        width = max((len(name) for name, _ in shown), default=0) if self.terminal else 0
        for name, value in shown:
            print(f"{name + ':':<{width + 1}} {value}" if self.terminal else f"{name}\t{value}")


def columns_that_fit(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> int:
    """Returns how many columns a terminal of ``width`` has room for: the last ones, the least important, go first.

    The first three stay in any case; ``--json`` and a pipe show all.
    """
    needed = 0
    for index, column in enumerate(columns):
        needed += max(len(column), *(len(row[index]) for row in cells)) + (2 if index else 0)
        if needed > width and index >= 3:
            return index
    return len(columns)


_STYLES = {
    "running": "cyan",
    "leased": "cyan",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "active": "green",
    "draining": "yellow",
    "disconnected": "red",
    "paused": "yellow",
}


def note(text: str) -> None:
    """Tells people something on standard error."""
    print(f"lessor: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(value: object) -> str:
    """Returns ``value`` as text that neither breaks a line nor moves the cursor; ``-`` for None and empty."""
    if value is None or value == "":
        return MISSING
    text = str(value)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text).strip() or MISSING


def time_text(time: datetime | None, *, terminal: bool, now: datetime | None = None) -> str | None:
    """Returns a time: how long ago on a terminal, RFC 3339 elsewhere."""
    if time is None:
        return None
    if not terminal:
        return str(plain(time))
    ago = (now or datetime.now(UTC)) - time
    return f"{span_text(ago)} ago" if ago >= timedelta(0) else f"in {span_text(-ago)}"


def span_text(span: timedelta) -> str:
    """Returns a duration roughly, for people: ``5s``, ``3m12s``, ``2h05m``, ``4d3h``."""
    seconds = max(0, int(span.total_seconds()))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24}h"


def bytes_text(count: int) -> str:
    """Returns a number of bytes roughly, for people: ``31.5GiB``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            return f"{amount:.1f}".removesuffix(".0") + unit
        amount /= 1024
    return f"{amount:.1f}".removesuffix(".0") + "PiB"
