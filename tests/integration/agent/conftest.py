"""Fixtures of the tests of the process runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from lessor_agent.keeper import nursery
from lessor_agent.runtimes.process import ProcessRuntime
from tests.support.process_runtime import Break, Fifo, open_runtime, write_faulty_entry


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[ProcessRuntime]:
    """An open runtime; none of its executions outlives the test."""
    async with open_runtime(tmp_path / "state") as opened:
        yield opened


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    """A pipe through which jobs say that something has happened."""
    made = Fifo(tmp_path / "fifo")
    yield made
    made.close()


@pytest.fixture
def breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Break:
    """Has zygotes that are started from now on run with a fault."""

    def break_(fault: str) -> None:
        write_faulty_entry(tmp_path / "faulty", fault)
        monkeypatch.setattr(nursery, "__file__", str(tmp_path / "faulty" / "nursery.py"))

    return break_
