"""The sizes that are searched, and the planted bugs: each is a rule left out, which the search must find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.model.promises import Promise
from tests.model.protocol import Protocol, Rules
from tests.model.search import Found, Search
from tests.model.world import Size

SMALL = Size("small", agents=1, leases=2, ttl=2, up=1, down=1)
GHOSTS = Size("ghosts", agents=1, leases=2, ttl=2, up=2, down=1)
REORDERED = Size("reordered", agents=1, leases=2, ttl=2, up=1, down=2)
LONG = Size("long ttl", agents=1, leases=2, ttl=3, up=1, down=1)
THREE = Size("three leases", agents=1, leases=3, ttl=2, up=1, down=1)
CANCELLED = Size("cancelled", agents=1, leases=2, ttl=2, up=1, down=1, endless=True)
LEADERS = Size("leaders", agents=1, leases=2, ttl=2, up=1, down=1, leaders=True)
FROZEN = Size("frozen", agents=1, leases=2, ttl=2, up=1, down=1, freezes=True)
PAIR = Size("pair", agents=2, leases=2, ttl=2, up=1, down=1)

LARGE = (
    Size("crowded", agents=1, leases=2, ttl=2, up=2, down=2),
    Size("crowded, three", agents=1, leases=3, ttl=2, up=2, down=2),
    Size("crowded, cancelled", agents=1, leases=2, ttl=2, up=2, down=2, endless=True),
    Size("crowded, frozen", agents=1, leases=2, ttl=2, up=2, down=2, freezes=True),
    Size("pair, three", agents=2, leases=3, ttl=2, up=1, down=1),
)
"""What takes too long for every run of the tests."""

SIZES: Mapping[Size, int] = {
    SMALL: 3_000,
    GHOSTS: 12_000,
    REORDERED: 5_000,
    LONG: 6_000,
    THREE: 7_000,
    CANCELLED: 2_000,
    LEADERS: 6_000,
    FROZEN: 3_000,
    PAIR: 100_000,
}
"""What the tests search → how many states there are at least: fewer, and something cannot happen any more."""


@dataclass(frozen=True)
class Bug:
    """A rule left out, and how that shows."""

    name: str
    rules: Rules
    size: Size
    """The smallest that shows it."""
    promise: Promise
    """What is broken. Others may break sooner; this one says what a user would see."""
    steps: int
    """Of the shortest way there."""

    def search(self) -> Found:
        """Searches the protocol without the rule, for this promise alone."""
        return Search(Protocol(self.size, self.rules), [self.promise]).run()


BUGS = (
    Bug("no-margin", Rules(margin=False), SMALL, Promise.ONE_EXECUTION, 17),
    Bug("receive-time", Rules(send_time=False), SMALL, Promise.ONE_EXECUTION, 18),
    Bug("end-unfenced", Rules(fencing=False), PAIR, Promise.NO_RERUN, 21),
    Bug("no-outbox", Rules(outbox=False), SMALL, Promise.END_KEPT, 10),
    Bug("revoke-ignored", Rules(revoke_obeyed=False), CANCELLED, Promise.SETTLES, 7),
    Bug("revoke-not-awaited", Rules(revoke_waits=False), PAIR, Promise.ONE_EXECUTION, 11),
    Bug("no-session-epoch", Rules(renewal_epoch=False), REORDERED, Promise.ONE_EXECUTION, 17),
    Bug("old-stream-read", Rules(stream_left=False), REORDERED, Promise.TOKENS_GROW, 16),
    Bug("no-leader-epoch", Rules(leader_epoch=False), LEADERS, Promise.ONE_EXECUTION, 19),
    Bug("no-session-lock", Rules(session_lock=False), SMALL, Promise.ONE_EXECUTION, 17),
    Bug("late-end-dropped", Rules(late_end=False), SMALL, Promise.END_KEPT, 15),
    Bug("end-not-spared", Rules(spared_end=False), SMALL, Promise.END_KEPT, 16),
    Bug("end-overwritten", Rules(final=False), SMALL, Promise.FINAL, 19),
    Bug("no-tombstone", Rules(tombstone=False), SMALL, Promise.ONE_EXECUTION, 13),
    Bug("thawed-unasked", Rules(thaw_asks=False), FROZEN, Promise.ONE_EXECUTION, 18),
    Bug("omission-proves", Rules(omission_asks=False), GHOSTS, Promise.ONE_EXECUTION, 12),
)
