"""GPUs that one lease has to leave before another may have them."""

from __future__ import annotations

from lessor_agent.protocol.lease import Lease


class Handover:
    """Who is on the way out, and who waits for its GPUs.

    The server may grant the GPUs of an expired lease anew, to this very agent, in
    the message after the one that says it is over. Its processes still have them:
    they stood still, and first have to be killed.
    """

    def __init__(self) -> None:
        """Begins with nobody."""
        self._leaving: dict[int, frozenset[str]] = {}
        """lease_id → GPUs."""
        self._waiting: dict[int, Lease] = {}

    def leaves(self, lease: Lease) -> None:
        """Its execution was told to end."""
        if lease.grant.gpu_uuids:
            self._leaving[lease.lease_id] = frozenset(lease.grant.gpu_uuids)

    def must_wait(self, lease: Lease) -> bool:
        """Whether a GPU of ``lease`` is not free yet; then it is among those that :meth:`gone` returns."""
        if not self._leaving or all(used.isdisjoint(lease.grant.gpu_uuids) for used in self._leaving.values()):
            return False
        self._waiting[lease.lease_id] = lease
        return True

    def waits(self, lease_id: int) -> bool:
        """Whether it waits; it does not any more."""
        return self._waiting.pop(lease_id, None) is not None

    def gone(self, lease_id: int) -> list[Lease]:
        """A lease is not held any more; returns those that wait no more, and may have to again."""
        self._waiting.pop(lease_id, None)
        if self._leaving.pop(lease_id, None) is None:
            return []
        waiting, self._waiting = self._waiting, {}
        return list(waiting.values())
