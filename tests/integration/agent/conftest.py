"""Fixtures of the tests of the process runtime."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from lessor_agent.boottime import boottime_ns
from lessor_agent.keeper import nursery
from lessor_agent.runtimes.base import Execution
from lessor_agent.runtimes.process import ProcessRuntime
from tests.support.cluster import until
from tests.support.freezing import Freeze, Lose, expire, stands_still, words_of
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


@pytest.fixture
def ticks(tmp_path: Path) -> Path:
    """Where jobs write when they ran."""
    path = tmp_path / "ticks"
    path.mkdir()
    return path


@pytest.fixture
def lose(caplog: pytest.LogCaptureFixture) -> Lose:
    """Has a lease be lost, and waits for what becomes of its tree."""
    caplog.set_level(logging.INFO, "lessor_agent")

    async def lose(execution: Execution) -> Freeze:
        deadline_ns = expire(execution)
        freezes = words_of(caplog.records).count("frozen")
        await until(lambda: words_of(caplog.records).count("frozen") > freezes)
        await until(lambda: stands_still(execution))
        return Freeze(deadline_ns, boottime_ns())

    return lose
