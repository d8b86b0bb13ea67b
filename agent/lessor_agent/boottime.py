"""The agent's clock: ``CLOCK_BOOTTIME``, and the boot it belongs to.

Lease deadlines on a host are nanoseconds of this clock. Unlike
``CLOCK_MONOTONIC`` it goes on while the host is suspended, and unlike the wall
clock nobody can set it. It starts anew at each boot, so a stored value means
something only together with :func:`boot_id`.
"""

from __future__ import annotations

import time

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


def boottime_ns() -> int:
    """Returns the time since this host booted, suspended time included, in nanoseconds."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """Returns the kernel's id of this boot, a UUID in text.

    Raises:
        OSError: /proc is not mounted.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
