"""The one seeded scheduler: virtual time, who acts next, and what has happened so far.

Whatever happens in a run is an event of this scheduler, taken in the order of
virtual time; every choice and every delay comes from its random numbers. So a
run is its seed: the same seed takes the same steps.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

MS_NS = 1_000_000
SECOND_NS = 1_000_000_000

PPM = 1_000_000
MAX_DRIFT_PPM = 10_000
"""Clocks go wrong by at most 1 %, as the protocol assumes."""


class Violation(AssertionError):
    """The system broke a promise; the message says which, and when."""


@dataclass(frozen=True, slots=True)
class Clock:
    """A process's own clock: it counts on from a time of its own, a little too fast or too slow."""

    rate_ppm: int
    """Parts per million that it gains per unit of real time; negative: it loses."""
    offset_ns: int

    def local_ns(self, real_ns: int) -> int:
        """Returns what it shows at a real time."""
        return self.offset_ns + real_ns + real_ns * self.rate_ppm // PPM

    def real_ns(self, local_ns: int) -> int:
        """Returns the first real time at which it shows at least ``local_ns``."""
        since_ns = local_ns - self.offset_ns
        real_ns = since_ns * PPM // (PPM + self.rate_ppm)
        while self.local_ns(real_ns) < local_ns:
            real_ns += 1
        return real_ns


class Process:
    """What can crash, stand still and start again. What was planned for one life of it is void in the next."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = clock
        self.life = 0
        """Grows with every start and every crash."""
        self.alive = False
        self.paused_until_ns = 0

    def begin_life(self) -> None:
        """It starts."""
        self.life += 1
        self.alive = True
        self.paused_until_ns = 0

    def end_life(self) -> None:
        """It is gone, with all that it had in memory."""
        self.life += 1
        self.alive = False


class Event:
    """Something that is going to happen."""

    __slots__ = ("_act", "cancelled", "life", "process", "what")

    def __init__(self, what: str, act: Callable[[], None], process: Process | None) -> None:
        self.what = what
        self._act = act
        self.process = process
        self.life = process.life if process is not None else 0
        self.cancelled = False

    def happen(self) -> None:
        """Lets it happen."""
        self._act()


class Scheduler:
    """Virtual time and the events that are to come."""

    def __init__(self, seed: int, *, keeps_trace: bool = False) -> None:
        """
        Args:
            seed: Of all random numbers of the run.
            keeps_trace: Keep every step's line, to be shown; else only their digest.
        """
        self.random = random.Random(seed)
        self.now_ns = 0
        self.steps = 0
        self.trace: list[str] = []
        self.happened: Counter[str] = Counter()
        """What happened how often: to see that a run meets what it is made for."""
        self._keeps_trace = keeps_trace
        self._digest = hashlib.sha256()
        self._heap: list[tuple[int, int, Event]] = []
        self._count = 0

    @property
    def digest(self) -> str:
        """Names the steps so far: two runs with one digest took the same steps."""
        return self._digest.hexdigest()[:16]

    def at(self, time_ns: int, what: str, act: Callable[[], None], process: Process | None = None) -> Event:
        """Has something happen at a time.

        Args:
            time_ns: Real time; what is past happens next.
            what: For the trace; empty: not a step worth a line.
            act: Does it.
            process: Whose doing it is: void if that crashes before, late if it is paused then.
        """
        event = Event(what, act, process)
        self._push(max(time_ns, self.now_ns), event)
        return event

    def after(self, delay_ns: int, what: str, act: Callable[[], None], process: Process | None = None) -> Event:
        """Has something happen after a delay; see :meth:`at`."""
        return self.at(self.now_ns + delay_ns, what, act, process)

    def _push(self, time_ns: int, event: Event) -> None:
        self._count += 1
        heapq.heappush(self._heap, (time_ns, self._count, event))

    def step(self) -> bool:
        """Takes the next step; False: nothing is to come."""
        while self._heap:
            time_ns, _, event = heapq.heappop(self._heap)
            process = event.process
            if event.cancelled or (process is not None and process.life != event.life):
                continue
            if process is not None and process.paused_until_ns > time_ns:
                # In the order they were due, once it goes on.
                self._push(process.paused_until_ns, event)
                continue
            self.now_ns = max(self.now_ns, time_ns)
            self.steps += 1
            if event.what:
                self.note(event.what)
            event.happen()
            return True
        return False

    def note(self, text: str) -> None:
        """Adds a line to the trace."""
        line = f"{self.now_ns / SECOND_NS:10.6f} {text}"
        self._digest.update(line.encode())
        if self._keeps_trace:
            self.trace.append(line)

    # ── choices ──────────────────────────────────────────────────────────────

    def chance(self, probability: float) -> bool:
        """Returns True with a probability."""
        return self.random.random() < probability

    def between_ns(self, low_s: float, high_s: float) -> int:
        """Returns a duration between two of seconds."""
        return int(self.random.uniform(low_s, high_s) * SECOND_NS)

    def spread_ns(self, usual_s: float, rare_s: float, rarely: float) -> int:
        """Returns a delay: mostly up to ``usual_s``, with the probability ``rarely`` up to ``rare_s``."""
        high_s = rare_s if self.random.random() < rarely else usual_s
        return int(self.random.random() * high_s * SECOND_NS)

    def a_clock(self) -> Clock:
        """Returns a clock that drifts as far as is allowed, or not at all."""
        rate_ppm = self.random.choice((-MAX_DRIFT_PPM, 0, MAX_DRIFT_PPM))
        return Clock(rate_ppm, self.random.randrange(1_000, 1_000_000) * SECOND_NS)
