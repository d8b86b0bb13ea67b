"""When the leader reads anew what it knows of the database."""

from __future__ import annotations

from contextlib import suppress

from lessor_server.services.reading import Reading


class Reads:
    """Reads that take as long as the test says."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.reading = Reading(lambda: self.now_s)

    def read(self, *took_s: float) -> None:
        """Reads once for each, one right after the other."""
        for each_s in took_s:
            with self.reading.timed():
                self.now_s += each_s

    def due_in_s(self, *, stale: bool = True, rest: float = 20) -> float:
        return round(self.reading.due_in_s(stale=stale, rest=rest), 6)


def test_the_first_read_is_due_at_once_and_the_next_by_age() -> None:
    reads = Reads()
    assert reads.due_in_s(stale=False) == 0
    reads.read(0.001, 0.001)
    assert reads.due_in_s(stale=False) == 1
    assert reads.due_in_s() == 0.02
    reads.now_s += 0.02
    assert reads.due_in_s() == 0


def test_a_long_read_is_followed_by_a_rest() -> None:
    reads = Reads()
    reads.read(0.5, 0.6)
    assert reads.due_in_s() == 10
    assert reads.due_in_s(rest=2) == 1
    reads.read(0.6)
    assert reads.due_in_s() == 12


def test_a_read_that_the_database_held_up_is_no_measure_of_the_next() -> None:
    reads = Reads()
    reads.read(0.001, 0.001, 20.0)
    assert reads.due_in_s() == 0.02
    reads.read(0.001)
    assert reads.due_in_s() == 0.02
    held_up_at_first = Reads()
    held_up_at_first.read(20.0)
    assert held_up_at_first.due_in_s() == 0


def test_no_rest_is_longer_than_a_minute() -> None:
    reads = Reads()
    reads.read(20.0, 20.0)
    assert reads.due_in_s() == 60


def test_a_read_that_fails_counts_for_nothing() -> None:
    reads = Reads()
    reads.read(0.001, 0.001)
    with suppress(ConnectionError), reads.reading.timed():
        reads.now_s += 5
        raise ConnectionError
    assert reads.due_in_s() == 0
    assert reads.reading.took_s < 0.002
