"""How a check becomes a test: ``@holds(Check.…)`` around a coroutine that is given a stage."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.stage import UNSUPPORTED, Stage, open_stage
from lessor_agent.testing.conformance.subject import Subject

Body = Callable[[Any, Stage], Coroutine[Any, Any, None]]
"""A method of a class of checks: it fails by an exception."""


class HeldCheck:
    """What a test of the suite knows of itself; :func:`held` finds it."""

    def __init__(self, check: Check, body: Body) -> None:
        """Joins a check and what tests it."""
        self.check = check
        self.body = body

    async def play(self, subject: Subject) -> None:
        """Plays the check on a stage of its own.

        Raises:
            AssertionError: The runtime does not keep it, or left something that cannot be ended.
            Exception: Whatever the runtime raised.
        """
        async with open_stage(subject) as stage:
            await self.body(subject, stage)


def holds(check: Check) -> Callable[[Body], Callable[[Any], None]]:
    """Makes the one test of ``check``: plain, so that it needs no plugin of pytest, with an event loop of its own."""

    def make(body: Body) -> Callable[[Any], None]:
        held_check = HeldCheck(check, body)

        def test(self: Subject) -> None:
            reason = self.unsupported.get(check)
            if reason is not None:
                pytest.skip(UNSUPPORTED + reason)
            asyncio.run(held_check.play(self))

        test.__name__, test.__qualname__, test.__module__ = body.__name__, body.__qualname__, body.__module__
        test.__doc__ = body.__doc__ or check.promise
        test.held_check = held_check  # type: ignore[attr-defined]
        return test

    return make


def held(function: object) -> HeldCheck | None:
    """Returns what :func:`holds` attached to a test; None: it is no test of the suite."""
    found = getattr(function, "held_check", None)
    return found if isinstance(found, HeldCheck) else None


def held_checks(subject: type[Subject]) -> list[HeldCheck]:
    """Returns what a class of tests holds a runtime to, in the order of :class:`Check`."""
    found = [each for _, function in inspect.getmembers(subject) if (each := held(function)) is not None]
    order = list(Check)
    return sorted(found, key=lambda each: order.index(each.check))
