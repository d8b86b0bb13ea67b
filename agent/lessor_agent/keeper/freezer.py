"""Has the whole tree below a keeper stand still, and go on.

A control group does it where one may be made (:mod:`.groups`), else SIGSTOP of
every process, over and over until a pass finds none that is new or runs. The
group is made, and the tree moved into it, shortly *before* it may be needed:
to move a process, the kernel may wait for all others on a busy host, to freeze
a group it does not; and most jobs never come so near to losing their lease.

What is not in the group when it is frozen is stopped: processes that did not let
themselves be moved, those that have moved themselves elsewhere, and everything
where there was no time. What the workload itself had stopped stays stopped when
it is thawed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from lessor_agent.keeper.groups import Group, make_group, thaw_all
from lessor_agent.keeper.tree import RUNNABLE, STOPPED, Process, offspring, send

_MAX_PASSES = 64
"""Passes in a row; a tree that still grows then is looked at again at once."""
GATHER_BUDGET_S = 1.0
"""Longest that a tree is moved into its group; what is left is stopped."""


class Freezer:
    """Freezes and thaws what is below this process."""

    def __init__(self, lease_id: int) -> None:
        """Does nothing yet.

        Args:
            lease_id: Whose tree it is.
        """
        self._lease_id = lease_id
        self._group: Group | None = None
        self._failed: Group | None = None
        """One that the kernel would not freeze: its members are stopped like all others."""
        self._stopped: dict[tuple[int, int], Process] = {}
        """(pid, start_ticks) → process that got SIGSTOP and must get SIGCONT."""
        self.gathered = False
        """The tree is where it can be frozen at once, or cannot be brought there."""
        self.frozen = False
        """The tree was told to stand still, and not to go on since."""

    def gather(self) -> None:
        """Moves the tree into a group of its own, as far as that is possible. Called once; nothing is held up."""
        self.gathered = True
        group = self._group = make_group(self._lease_id)
        until_s = time.monotonic() + GATHER_BUDGET_S
        if group is None:
            return
        asked: set[tuple[int, int]] = set()
        for _ in range(_MAX_PASSES):
            fresh = [p for p in offspring(os.getpid()) if self._is_outside(p) and _name(p) not in asked]
            for process in fresh:
                if time.monotonic() >= until_s:
                    return
                asked.add(_name(process))
                # One that is gone, or is not to be moved, will be stopped where it is.
                with contextlib.suppress(OSError):
                    group.add(process.pid)
            if not fresh:
                return

    def freeze(self) -> bool:
        """Has the tree stand still. Called again, it does so with what has come to it, or was woken, meanwhile.

        Returns:
            True if all of it does, or will before it runs another instruction of its own; False: look again.
        """
        self.frozen = True
        if self._group is not None:
            try:
                # Before anything else is looked at: this is where all of it is, as a rule.
                self._group.freeze()
            except OSError:
                self._failed, self._group = self._group, None
        return self._stop_the_rest() and self._group_stands_still()

    def thaw(self) -> None:
        """Has the tree go on.

        Raises:
            OSError: The kernel refuses; some of it may stand still. To be called again, or :meth:`freeze`.
        """
        if self._group is not None:
            self._group.thaw()
        if self._failed is not None:
            thaw_all([self._failed])
        for process in list(self._stopped.values()):
            # Forgotten only once it was told: called again after a failure, this goes on where it was.
            send(process, signal.SIGCONT)
            del self._stopped[_name(process)]
        self.frozen = False

    def close(self) -> None:
        """Removes what it has made; the tree is gone. Closing twice does nothing."""
        for group in (self._group, self._failed):
            if group is not None:
                # What cannot be removed now the zygote tries again, or the next agent.
                with contextlib.suppress(OSError):
                    group.remove()
        self._group = self._failed = None

    def _is_outside(self, process: Process) -> bool:
        """Returns whether it lives, and no group freezes it."""
        return process.alive and (self._group is None or not self._group.holds(process.thread))

    def _stop_the_rest(self) -> bool:
        """Stops every process that no group freezes. Returns whether none of them runs.

        A pass may miss the child of a process that ends meanwhile. It is this
        process's own child then, and nobody buries it or those that it leaves: the
        next pass finds one that none has found before, so that a pass which finds
        nothing new has missed none.
        """
        keeper = os.getpid()
        known: set[tuple[int, int]] = set()
        dead: set[int] = set()
        for _ in range(_MAX_PASSES):
            news = runs = False
            for process in offspring(keeper, dead):
                if not process.alive and process.parent == keeper:
                    dead.add(process.pid)
                elif self._is_outside(process):
                    stopped, running = self._stop(process)
                    news |= stopped
                    runs |= running
                news |= _name(process) not in known
                known.add(_name(process))
            if not news:
                return not runs
        return False

    def _stop(self, process: Process) -> tuple[bool, bool]:
        """Stops it, unless it is. Returns whether it was not to be stopped before, and whether it ran though it was."""
        fresh = _name(process) not in self._stopped and process.state != STOPPED
        woken = _name(process) in self._stopped and process.state in RUNNABLE
        if fresh:
            # Before the signal: else a failure in between could leave one that nobody lets go on.
            self._stopped[_name(process)] = process
        if fresh or woken:
            # One that still shows as runnable then has the signal, and has not been given a processor since.
            send(process, signal.SIGSTOP)
        return fresh, woken

    def _group_stands_still(self) -> bool:
        if self._group is None:
            return True
        try:
            return self._group.stands_still()
        except OSError:
            return False


def _name(process: Process) -> tuple[int, int]:
    """Returns what no other process is ever called."""
    return process.pid, process.start_ticks
