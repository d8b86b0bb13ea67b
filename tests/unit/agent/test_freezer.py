"""The keeper's freezer: a tree that forks faster than it can be looked at."""

from __future__ import annotations

import signal
from collections.abc import Container, Iterator

import pytest

from lessor_agent.keeper import freezer
from lessor_agent.keeper.tree import STOPPED, Process


class Chain:
    """A process that forks the next one and ends, over and over; a look at it finds only the dead, most times."""

    def __init__(self, misses: int) -> None:
        self.misses = misses
        """Looks that come too late for the one that lives."""
        self.looks = 0
        self.living = 100
        self.stopped = False

    def offspring(self, root: int, spared: Container[int] = ()) -> Iterator[Process]:
        self.looks += 1
        if self.looks <= self.misses:
            # It ended when it was found, and its child is born when the list has been read.
            self.living += 1
        elif self.living not in spared:
            yield process(root, self.living, STOPPED if self.stopped else "R")
        yield from (process(root, pid, "Z") for pid in range(self.living - 1, 99, -1) if pid not in spared)

    def send(self, process: Process, signum: int) -> bool:
        assert process.pid == self.living
        self.stopped = signum == signal.SIGSTOP
        return True


def process(parent: int, pid: int, state: str) -> Process:
    return Process(pid, parent, session=1, start_ticks=pid, state=state, thread=pid)


@pytest.mark.parametrize("misses", [0, 1, 2, 3, 10])
def test_a_tree_stands_still_once_a_look_at_it_finds_nothing_new(monkeypatch: pytest.MonkeyPatch, misses: int) -> None:
    chain = Chain(misses)
    monkeypatch.setattr(freezer, "offspring", chain.offspring)
    monkeypatch.setattr(freezer, "send", chain.send)
    tree = freezer.Freezer(1)
    assert tree.freeze()
    assert chain.stopped
    tree.thaw()
    assert not chain.stopped


def test_a_tree_that_outruns_every_look_is_not_taken_to_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(misses=1_000_000)
    monkeypatch.setattr(freezer, "offspring", chain.offspring)
    monkeypatch.setattr(freezer, "send", chain.send)
    assert not freezer.Freezer(1).freeze()
