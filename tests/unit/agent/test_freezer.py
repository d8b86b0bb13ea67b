"""The keeper's freezer against trees that fork, die and are killed between any two of its looks."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass

import pytest

from lessor_agent.keeper import freezer
from lessor_agent.keeper.freezer import Freezer, Stillness
from lessor_agent.keeper.tree import Process

KEEPER = os.getpid()
SEEDS = 2000


@dataclass
class Alive:
    """A process, as the kernel keeps it."""

    parent: int
    told: bool = False
    """SIGSTOP is on its way, or has come: no fork of it begins."""
    stopped: bool = False
    """Its first thread shows so."""
    forks: bool = False
    """Another thread of it is amid a fork, which SIGSTOP does not break off."""
    dead: bool = False
    buries_itself: bool = False
    """Its parent takes no notice of it: nothing is left when it ends."""


class Kernel:
    """A tree below the keeper. Whatever may happen in between happens at each look."""

    def __init__(self, seed: int, births: int) -> None:
        self.random = random.Random(seed)
        self.kills = self.random.choice((0.0, 0.01, 0.05, 0.2))
        self.exits = self.random.choice((0.05, 0.15, 0.4))
        self.pace = self.random.choice((0.1, 0.3, 0.6))
        """Chances at each look."""
        self.births = births
        """How many may still be born."""
        self.table: dict[int, Alive] = {}
        self.last_pid = KEEPER
        self.born(KEEPER)

    def born(self, parent: int) -> None:
        self.births -= 1
        self.last_pid += 1
        self.table[self.last_pid] = Alive(parent, buries_itself=parent != KEEPER and self.random.random() < 0.2)

    def happen(self) -> None:
        for pid, process in list(self.table.items()):
            chance = self.random.random()
            if process.dead:
                parent = self.table.get(process.parent)
                if parent is not None and not parent.told and chance < 0.2:
                    # Buried by a parent that runs.
                    del self.table[pid]
            elif process.told and chance < self.kills:
                # Somebody else kills it; that breaks off a fork as well.
                self.ends(pid)
            elif process.told and not process.stopped and chance < 0.5:
                process.stopped = True
            elif process.forks:
                if chance < self.pace:
                    process.forks = False
                    self.born(pid)
            elif process.told:
                pass
            elif chance < self.exits:
                self.ends(pid)
            elif chance < self.exits + self.pace:
                process.forks = self.births > 0

    def ends(self, pid: int) -> None:
        for child in self.table.values():
            if child.parent == pid:
                child.parent, child.buries_itself = KEEPER, False
        self.table[pid].forks = False
        if self.table[pid].buries_itself:
            del self.table[pid]
        else:
            self.table[pid].dead = True

    # -- as the freezer sees it ------------------------------------------------

    def children_of(self, pid: int) -> list[int]:
        self.happen()
        return [child for child, process in self.table.items() if process.parent == pid]

    def read_process(self, pid: int) -> Process | None:
        self.happen()
        process = self.table.get(pid)
        if process is None:
            return None
        state = "Z" if process.dead else "T" if process.stopped else self.random.choice("RSD")
        return Process(pid, process.parent, session=1, start_ticks=pid, state=state, thread=pid)

    def is_stopped(self, pid: int) -> bool:
        self.happen()
        process = self.table.get(pid)
        return process is not None and (process.dead or (process.stopped and not process.forks))

    def send(self, process: Process, signum: int) -> bool:
        self.happen()
        found = self.table.get(process.pid)
        if found is None or found.dead:
            return False
        found.told = signum == signal.SIGSTOP
        found.stopped &= found.told
        return True

    def running(self) -> list[int]:
        return [pid for pid, process in self.table.items() if not process.dead and (not process.told or process.forks)]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> object:
    def plant(kernel: Kernel) -> None:
        for name in ("children_of", "read_process", "is_stopped", "send"):
            monkeypatch.setattr(freezer, name, getattr(kernel, name))

    return plant


@pytest.mark.parametrize("births", [1, 5, 40])
def test_a_tree_that_is_said_to_stand_still_does(plant, births: int) -> None:  # type: ignore[no-untyped-def]
    for seed in range(SEEDS):
        kernel = Kernel(seed, births)
        plant(kernel)
        tree = Freezer(1)
        while tree.freeze() is not Stillness.STILL:
            pass
        assert kernel.running() == [], f"seed {seed}"
        # Killed by somebody else, whatever it leaves stands still as well.
        kernel.happen()
        assert kernel.running() == [], f"seed {seed}"
        tree.thaw()
        assert [pid for pid, process in kernel.table.items() if not process.dead and process.told] == []


def test_a_tree_that_outruns_every_pass_is_said_to_grow(plant, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    kernel = Kernel(1, births=1 << 30)
    plant(kernel)
    # Each is dead, and has a child, before it can be told anything.
    monkeypatch.setattr(kernel, "happen", lambda: None)

    def outrun(pid: int) -> Process | None:
        (living,) = kernel.running()
        if pid == living:
            kernel.born(KEEPER)
            kernel.ends(pid)
        return Kernel.read_process(kernel, pid)

    monkeypatch.setattr(freezer, "read_process", outrun)
    assert Freezer(1).freeze() is Stillness.GROWS


def test_what_has_not_heard_yet_is_said_to_be_slow(plant, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    kernel = Kernel(1, births=0)
    plant(kernel)
    monkeypatch.setattr(kernel, "happen", lambda: None)
    tree = Freezer(1)
    assert tree.freeze() is Stillness.SLOW
    for process in kernel.table.values():
        process.stopped = process.told
    assert tree.freeze() is Stillness.STILL
