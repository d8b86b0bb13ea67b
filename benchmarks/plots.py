"""Plots of results, for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Result


def draw(results: Sequence[Result], directory: Path) -> list[Path]:
    """Writes a PNG per scenario that has something to plot; returns their paths."""
    return []
