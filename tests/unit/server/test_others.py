"""Which other replicas a replica takes to be there."""

from __future__ import annotations

from lessor_server.wakeups import ABSENT_S, Others


def test_nobody_is_there_at_first() -> None:
    assert not Others().any(0.0)


def test_one_that_was_heard_is_there_until_it_was_silent_for_too_long() -> None:
    others = Others()
    assert others.heard("a", 10.0)
    assert others.any(10.0)
    assert others.any(10.0 + ABSENT_S - 0.001)
    assert not others.any(10.0 + ABSENT_S)


def test_each_word_counts_anew_and_only_the_first_is_new() -> None:
    others = Others()
    assert others.heard("a", 10.0)
    assert not others.heard("a", 10.0 + ABSENT_S - 0.001)
    assert others.any(10.0 + 2 * ABSENT_S - 0.01)


def test_one_that_was_gone_is_new_again() -> None:
    others = Others()
    others.heard("a", 10.0)
    assert others.heard("a", 10.0 + ABSENT_S)


def test_the_one_heard_last_counts_whichever_came_first() -> None:
    others = Others()
    others.heard("a", 10.0)
    others.heard("b", 11.0)
    others.heard("a", 12.0)
    assert others.any(12.0 + ABSENT_S - 0.001)
    assert not others.any(12.0 + ABSENT_S)
