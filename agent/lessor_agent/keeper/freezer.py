"""Has the whole tree below a keeper stand still, and go on.

A control group does it where one may be made (:mod:`.groups`), else SIGSTOP of
every process, over and over until all are known to be stopped. The
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
from enum import Enum

from lessor_agent.keeper.groups import Group, make_group, thaw_all
from lessor_agent.keeper.tree import RUNNABLE, STOPPED, Process, children_of, is_stopped, offspring, read_process, send

_MAX_PASSES = 64
"""Passes in a row, so that the keeper hears of other things too."""
GATHER_BUDGET_S = 1.0
"""Longest that a tree is moved into its group; what is left is stopped."""


class Stillness(Enum):
    """What a look at a tree that was told to stand still has found."""

    STILL = "still"
    """Nothing of it runs, and nothing will before it is let."""
    SLOW = "slow"
    """All of it was told; what is in the kernel, or waits for a processor, has not heard yet."""
    GROWS = "grows"
    """It makes processes faster than they can be stopped."""


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
            fresh = [
                process
                for process in offspring(os.getpid())
                if process.alive and not group.holds(process.thread) and _name(process) not in asked
            ]
            for process in fresh:
                if time.monotonic() >= until_s:
                    return
                asked.add(_name(process))
                # One that is gone, or is not to be moved, will be stopped where it is.
                with contextlib.suppress(OSError):
                    group.add(process.pid)
            if not fresh:
                return

    def freeze(self) -> Stillness:
        """Has the tree stand still. Called again, it does so with what has come to it, or was woken, meanwhile."""
        self.frozen = True
        if self._group is not None:
            try:
                # Before anything else is looked at: this is where all of it is, as a rule.
                self._group.freeze()
            except OSError:
                self._failed, self._group = self._group, None
        return _Look(self._group, self._stopped).stop_all()

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


class _Look:
    """One look at the tree, in as many passes as it takes.

    A process is *settled* once all its threads were seen stopped, and its children
    listed after that: it will have no others. A pass begins with the keeper's own
    children, and is the last one if it finds nothing that was not settled, or known
    to be dead, before it began. Then none was missed. A process that nobody listed
    has lost its parent, so it is the keeper's child, and stays one: nobody buries it
    meanwhile. Its parent was never settled, or its death would not matter; so this
    parent was found dead, or new, or just settled, or gone, and there was another
    pass after that.
    """

    def __init__(self, group: Group | None, stopped: dict[tuple[int, int], Process]) -> None:
        self._group = group
        self._group_is_still = group is not None and _stands_still(group)
        self._stopped = stopped
        self._children: dict[int, list[int]] = {}
        """Pid of a settled process → its children."""
        self._states: dict[int, tuple[int, bool] | None] = {}
        """Pid → when it started and whether it lived, when it was last looked at; None: it was gone."""
        self._found_news = self._all_settled = False

    def stop_all(self) -> Stillness:
        """Stops every process that no group freezes."""
        for _ in range(_MAX_PASSES):
            self._found_news, self._all_settled = False, True
            self._pass()
            if not self._found_news:
                return Stillness.STILL if self._all_settled else Stillness.SLOW
        return Stillness.GROWS

    def _pass(self) -> None:
        # The youngest first, and each is stopped before its children are listed: that overtakes a tree that forks.
        stack = children_of(os.getpid())
        seen: set[int] = set()
        while stack:
            pid = stack.pop()
            if pid not in seen:
                seen.add(pid)
                stack += self._children[pid] if pid in self._children else self._meet(pid)

    def _meet(self, pid: int) -> list[int]:
        """Looks at a process that is not settled; returns its children."""
        process = read_process(pid)
        state = None if process is None else (process.start_ticks, process.alive)
        if pid not in self._states or self._states[pid] != state:
            self._states[pid], self._found_news = state, True
        if process is None:
            return []
        if not process.alive:
            if process.parent == os.getpid():
                # It stays dead, and listed.
                self._children[pid] = []
            return []
        in_group = self._group is not None and self._group.holds(process.thread)
        if not in_group:
            self._stop(process)
        still = self._group_is_still if in_group else is_stopped(pid)
        children = children_of(pid)
        if still:
            # News: should it have been killed since, what it left is with the keeper, whose list was read before.
            self._children[pid], self._found_news = children, True
        else:
            self._all_settled = False
        return children

    def _stop(self, process: Process) -> None:
        if _name(process) in self._stopped:
            if process.state in RUNNABLE:
                # Somebody let it go on, or it has not been given a processor since.
                send(process, signal.SIGSTOP)
        elif process.state != STOPPED:
            # Before the signal: else a failure in between could leave one that nobody lets go on.
            self._stopped[_name(process)] = process
            send(process, signal.SIGSTOP)


def _stands_still(group: Group) -> bool:
    try:
        return group.stands_still()
    except OSError:
        return False


def _name(process: Process) -> tuple[int, int]:
    """Returns what no other process is ever called."""
    return process.pid, process.start_ticks
