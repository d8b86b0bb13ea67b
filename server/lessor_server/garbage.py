"""The garbage collector, set for a process that holds much and throws away little in cycles.

Every stream of an agent is more than a hundred objects that live as long as it
does. With Python's settings all of them are looked through again and again: with
2,000 idle agents that was a fifth of the server's CPU time, in pauses of up to
half a second in which no heartbeat was answered. Nearly everything here is freed
by its reference count. What is in cycles is young: five objects of grpc per call,
some eighty of the traceback of a refused one.
"""

from __future__ import annotations

import gc

THRESHOLDS = (10_000, 5, 100)
"""Young objects are looked through once 10,000 have been added (10 ms), the next generation at every fifth time.

The oldest is looked through at every hundredth of those, if it has grown by a quarter: as good as never while
idle, every few minutes at thousands of calls a second.
"""


def settle() -> None:
    """Takes what is there now for good, so that it is never looked at again; call it once the server is up."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
