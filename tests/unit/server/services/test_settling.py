"""When the fleet comes back from a silence: for whom the planner waits, and for how long."""

from __future__ import annotations

from lessor_server.services.settling import SETTLE_S, Settling

ALL = frozenset({"a", "b", "c"})
NONE: frozenset[str] = frozenset()


def after_a_silence(losses: int = 1) -> Settling:
    settling = Settling()
    settling.look(ALL, 0, 0.0)
    settling.look(NONE, 0, 10.0)
    settling.look(NONE, losses, 40.0)
    return settling


def test_a_fleet_that_begins_is_not_waited_for() -> None:
    settling = Settling()
    for now_s, fresh in enumerate((NONE, frozenset({"a"}), ALL)):
        settling.look(fresh, now_s, now_s)
        assert settling.left_s(now_s) == 0


def test_all_that_were_heard_before_are_waited_for() -> None:
    settling = after_a_silence()
    assert settling.left_s(40.0) == 0, "there is nobody to grant anything to"
    settling.look(frozenset({"a"}), 1, 50.0)
    assert settling.left_s(50.0) == SETTLE_S
    settling.look(frozenset({"a", "b", "new"}), 1, 51.0)
    assert settling.left_s(51.0) == SETTLE_S - 1
    settling.look(ALL, 1, 52.0)
    assert settling.left_s(52.0) == 0


def test_who_does_not_come_is_not_waited_for_any_longer() -> None:
    settling = after_a_silence()
    settling.look(frozenset({"a"}), 1, 50.0)
    assert settling.left_s(50.0 + SETTLE_S) == 0
    settling.look(frozenset({"a"}), 1, 50.0 + SETTLE_S)
    # From now on it is the whole fleet.
    settling.look(NONE, 1, 60.0)
    settling.look(NONE, 2, 90.0)
    settling.look(frozenset({"a"}), 2, 91.0)
    assert settling.left_s(91.0) == 0


def test_a_silence_without_a_loss_holds_nothing_up() -> None:
    settling = after_a_silence(losses=0)
    settling.look(frozenset({"a"}), 0, 50.0)
    assert settling.left_s(50.0) == 0


def test_a_part_of_the_fleet_is_not_waited_for() -> None:
    settling = Settling()
    settling.look(ALL, 0, 0.0)
    for losses, fresh in ((1, frozenset({"a"})), (2, frozenset({"b"})), (3, ALL)):
        settling.look(fresh, losses, float(losses))
        assert settling.left_s(losses) == 0


def test_a_second_silence_while_it_settles_begins_anew() -> None:
    settling = after_a_silence()
    settling.look(frozenset({"a"}), 1, 50.0)
    settling.look(NONE, 1, 52.0)
    assert settling.left_s(52.0) == 0
    settling.look(frozenset({"b"}), 1, 90.0)
    assert settling.left_s(90.0) == SETTLE_S
