"""The leases that are never started: given back, rejected or forgotten."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

MAX_TOMBSTONES = 10_000
"""Kept in memory; the oldest go first. Only a late message of this very session can need one."""


class Tombstones:
    """lease_ids, the latest :data:`MAX_TOMBSTONES` of them."""

    def __init__(self, lease_ids: Iterable[int]) -> None:
        """Begins with what the journal has, oldest first."""
        self._ids: OrderedDict[int, None] = OrderedDict.fromkeys(lease_ids)

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._ids

    def bury(self, lease_id: int) -> None:
        """Adds one, as the latest."""
        self._ids[lease_id] = None
        self._ids.move_to_end(lease_id)
        while len(self._ids) > MAX_TOMBSTONES:
            self._ids.popitem(last=False)
