"""The suite finds what it is there to find: a runtime with a fault fails the checks of that fault, and no others."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest

from lessor_agent.runtimes.base import Capabilities, Runtime, RuntimeContext, StartRequest, StopCause
from lessor_agent.runtimes.process import ProcessRuntime
from lessor_agent.testing.conformance import Check, RuntimeConformance
from lessor_agent.testing.conformance.holding import HeldCheck, held_checks
from lessor_agent.testing.conformance.stage import UNSUPPORTED, Stage, open_stage
from tests.conformance import faults
from tests.conformance.faults import Faulty, FaultyRuntime
from tests.support.process_runtime import open_runtime

AT_ONCE = 6
NEAR = 2
"""How many checks that a fault does not break are run beside each that it does."""
HANGS = timedelta(seconds=4)
"""How long a check waits that is to fail, be it by waiting."""


@dataclass(frozen=True)
class Fault:
    """A fault, and what finds it."""

    planted: type[Faulty] | type[FaultyRuntime]
    breaks: set[Check]
    """Exactly these fail, of those that are run."""
    maybe: set[Check] = field(default_factory=set)
    """These may."""
    beside: set[Check] = field(default_factory=set)
    """These are run as well; empty: the next ones of each topic."""

    @property
    def name(self) -> str:
        return self.planted.__name__

    def runtime_class(self) -> type[Runtime]:
        """Returns the runtime that has it."""
        if issubclass(self.planted, FaultyRuntime):
            return self.planted
        return type(self.name, (FaultyRuntime,), {"execution": self.planted})

    def checks(self) -> set[Check]:
        """Returns those that are run."""
        return self.breaks | (self.beside or {near for check in self.breaks for near in self._near(check)})

    def _near(self, check: Check) -> list[Check]:
        others = [each for each in Check if each.topic is check.topic and each not in self.breaks]
        after = [each for each in others if list(Check).index(each) > list(Check).index(check)]
        return [*after, *others][:NEAR]


FAULTS = [
    Fault(faults.CodeSwallowed, {Check.EXIT_CODE, Check.WAIT_AGAIN}),
    Fault(faults.SignalAsCode, {Check.EXIT_SIGNAL}),
    Fault(faults.LocalTime, {Check.EXIT_TIMES}),
    Fault(
        faults.StartErrorAsCode,
        {Check.START_ERROR_MISSING, Check.START_ERROR_PERMISSION, Check.START_ERROR_DIRECTORY},
    ),
    Fault(faults.Mixed, {Check.OUTPUT_APART, Check.OUTPUT_BINARY}),
    Fault(faults.Decoded, {Check.OUTPUT_BINARY}),
    Fault(faults.Truncated, {Check.OUTPUT_LARGE}),
    Fault(faults.OutputAtTheEnd, {Check.OUTPUT_LIVE, Check.OUTPUT_FILES}),
    Fault(faults.InputInherited, {Check.STDIN_EMPTY}),
    Fault(faults.EventsDropped, {Check.EVENTS_EXACT, Check.EVENTS_LIVE}),
    Fault(faults.EventsParsed, {Check.EVENTS_EXACT, Check.EVENTS_LIVE}),
    # The user's check is a shell script, which another shell around it may read otherwise.
    Fault(faults.ThroughAShell, {Check.ARGV}, maybe={Check.USER}),
    Fault(faults.GpusForgotten, {Check.GPUS}),
    Fault(faults.AllGpus, {Check.NO_GPUS}),
    Fault(faults.VariablesDropped, {Check.ENV_OF_JOB, Check.ENV_OF_HOST}),
    Fault(faults.AttemptForgotten, {Check.ENV_OF_LESSOR}),
    Fault(faults.HostLeaks, {Check.ENV_OF_HOST, Check.ENV_NO_CREDENTIALS}),
    Fault(faults.CheckpointDropped, {Check.CHECKPOINT}),
    Fault(faults.DirectoryIgnored, {Check.WORKING_DIR_GIVEN}),
    Fault(faults.OneDirectory, {Check.WORKING_DIR_FRESH}),
    Fault(faults.UserIgnored, {Check.USER, Check.USER_UNKNOWN}),
    Fault(faults.SecondExecution, {Check.PREPARE_ONCE, Check.PREPARE_AGAIN, Check.PREPARE_ENDED}),
    Fault(faults.BegunAtPrepare, {Check.PREPARE_RUNS_NOTHING}),
    Fault(faults.BegunAgain, {Check.BEGIN_TWICE}),
    Fault(faults.RefusedOtherwise, {Check.START_REFUSED}),
    Fault(faults.Crossed, {Check.MANY_AT_ONCE}),
    Fault(faults.GraceIgnored, {Check.STOP_COOPERATIVE, Check.STOP_FORCED, Check.STOP_TREE}),
    Fault(faults.NeverForced, {Check.STOP_FORCED, Check.STOP_TREE, Check.STOP_SHORTENS, Check.STOP_CAUSE}),
    Fault(faults.StopOnce, {Check.STOP_SHORTENS, Check.STOP_CAUSE}),
    Fault(faults.LastCause, {Check.STOP_CAUSE, Check.STOP_ENDED}),
    Fault(faults.StopForgottenBeforeBegin, {Check.STOP_BEFORE_BEGIN}),
    Fault(
        faults.EndToldEarly,
        {Check.STOP_TREE, Check.LEFTOVERS},
        beside={Check.STOP_COOPERATIVE, Check.STOP_BEFORE_BEGIN},
    ),
    Fault(faults.TimeoutIgnored, {Check.RUN_TIMEOUT}),
    Fault(
        faults.NotEnforced,
        {
            Check.DEADLINE_STOP,
            Check.DEADLINE_ALONE,
            Check.DEADLINE_UNBEGUN,
            Check.DEADLINE_RENEWED,
            Check.DEADLINE_FREEZE,
            Check.FROZEN_STOP,
        },
    ),
    Fault(faults.AlwaysStopped, {Check.DEADLINE_CONTINUE, Check.DEADLINE_FREEZE, Check.FROZEN_STOP}),
    Fault(faults.RenewIgnored, {Check.DEADLINE_RENEWED, Check.DEADLINE_FREEZE}),
    Fault(faults.RenewedForEver, {Check.DEADLINE_RENEWED}),
    Fault(faults.MovedBack, {Check.RENEW_NEVER_BACK}),
    Fault(
        faults.AdoptLoses,
        {
            Check.HANDLE_JSON,
            Check.ADOPT_RUNNING,
            Check.ADOPT_ENDED,
            Check.ADOPT_PREPARED,
            Check.ADOPT_STOPPED,
            Check.STRAYS,
        },
    ),
    Fault(faults.AdoptInvents, {Check.ADOPT_VANISHED, Check.ADOPT_UNKNOWN, Check.FORGET}),
    Fault(faults.AdoptBegins, {Check.ADOPT_PREPARED}, maybe={Check.STRAYS}),
    Fault(
        faults.AdoptStops,
        {Check.ADOPT_RUNNING, Check.ADOPT_PREPARED, Check.ADOPT_STOPPED},
        # It may come to its own end before the stop reaches it; or not be seen to end so soon.
        maybe={Check.HANDLE_JSON, Check.STRAYS},
    ),
    Fault(faults.StraysHidden, {Check.STRAYS}),
    Fault(faults.StraysOfNeighbours, {Check.STRAYS_APART}),
    Fault(faults.FilesLeft, {Check.ADOPT_UNKNOWN, Check.FORGET}),
    Fault(faults.ForgetOnce, {Check.FORGET}),
]


class Planted(RuntimeConformance):
    """The suite over a runtime with a fault; what that leaves running the process runtime ends."""

    lease = timedelta(seconds=1)
    late = timedelta(milliseconds=500)
    many = 5
    large_mb = 2

    def make_cleaner(self, context: RuntimeContext) -> Runtime:
        return ProcessRuntime(context)


def planted(runtime: type[Runtime], patience: timedelta = 2 * RuntimeConformance.patience) -> RuntimeConformance:
    """Returns the suite over a runtime."""
    return type("Planted", (Planted,), {"runtime_class": runtime, "patience": patience})()


async def failed(fault: Fault, checks: Iterable[HeldCheck]) -> dict[Check, str]:
    """Returns which checks fail, and with what; several are played at once, for most of them wait."""
    room = asyncio.Semaphore(AT_ONCE)

    async def play(held: HeldCheck) -> str | None:
        subject = planted(fault.runtime_class(), *([HANGS] if held.check in fault.breaks else []))
        async with room:
            try:
                await held.play(subject)
            except (Exception, pytest.fail.Exception) as error:
                return f"{type(error).__name__}: {error}"
        return None

    held = list(checks)
    said = await asyncio.gather(*(play(each) for each in held))
    return {each.check: text for each, text in zip(held, said, strict=True) if text is not None}


@pytest.mark.skipif("LESSOR_PLANTED_FAULTS" not in os.environ, reason="takes a minute and a half: make conformance")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_a_planted_fault_fails_its_checks_and_no_others(fault: Fault) -> None:
    found = await failed(fault, [each for each in held_checks(RuntimeConformance) if each.check in fault.checks()])
    unexpected = {check.id: said for check, said in found.items() if check not in fault.breaks | fault.maybe}
    assert not unexpected
    assert fault.breaks <= found.keys(), f"not found by {[check.id for check in fault.breaks - found.keys()]}"


def test_every_check_has_a_fault_that_fails_it() -> None:
    assert {check for check in Check if not any(check in fault.breaks for fault in FAULTS)} == set()


def test_every_check_has_exactly_one_test_of_its_name() -> None:
    held = held_checks(RuntimeConformance)
    assert [each.check for each in held] == list(Check)
    assert [each.body.__name__ for each in held] == [f"test_{check.id.replace('-', '_')}" for check in Check]
    assert len({check.id for check in Check}) == len(Check)


@pytest.mark.parametrize(
    ("unsupported", "said"),
    [
        ({Check.USER: ""}, "is no reason"),
        ({Check.USER: "  "}, "is no reason"),
        ({Check.USER: None}, "is no reason"),
        ({"user": "because"}, "is no Check"),
    ],
)
def test_what_is_unsupported_names_a_check_and_a_reason(unsupported: object, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        type("Mine", (RuntimeConformance,), {"runtime_class": ProcessRuntime, "unsupported": unsupported})


def test_a_declared_unsupported_check_is_skipped_with_its_reason() -> None:
    mine = type(
        "Mine", (RuntimeConformance,), {"runtime_class": ProcessRuntime, "unsupported": {Check.USER: "one user only"}}
    )
    with pytest.raises(pytest.skip.Exception, match=f"{UNSUPPORTED}one user only"):
        mine().test_user()


class Modest(FaultyRuntime):
    """It says that it can neither freeze nor set the user; the latter it does not refuse."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(can_set_user=False, can_freeze=False)

    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, user=None)


def test_what_the_capabilities_deny_is_unsupported_or_must_be_refused() -> None:
    subject = planted(Modest)
    with pytest.raises(pytest.skip.Exception, match=f"{UNSUPPORTED}.*can_freeze"):
        subject.test_deadline_freeze()
    with pytest.raises(pytest.fail.Exception, match="StartRefused"):
        subject.test_user()


def test_starts_that_take_longer_than_every_lease_are_told_with_the_remedy() -> None:
    hurried = type("Hurried", (Planted,), {"runtime_class": ProcessRuntime, "lease": timedelta(0)})
    with pytest.raises(AssertionError, match="give `lease` a longer time"):
        hurried().test_deadline_stop()


async def test_jobs_that_find_everything_elsewhere_are_told_where(tmp_path: Path) -> None:
    """As in a container: another path, another way to start Python."""
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").symlink_to("here")

    class Elsewhere(Planted):
        runtime_class = ProcessRuntime

        def python(self) -> Sequence[str]:
            return ["/usr/bin/env", "--", sys.executable]

        def parent_dir(self) -> Path:
            return tmp_path / "here"

        def there(self, path: Path) -> str:
            return str(tmp_path / "elsewhere" / path.relative_to(tmp_path / "here"))

    wanted = {Check.ARGV, Check.WORKING_DIR_GIVEN, Check.STOP_TREE, Check.START_ERROR_PERMISSION, Check.EVENTS_LIVE}
    for held in held_checks(Elsewhere):
        if held.check in wanted:
            await held.play(Elsewhere())
    # Nothing is left of any of them.
    assert list((tmp_path / "here").iterdir()) == []


async def test_what_cannot_be_ended_after_a_check_is_told(tmp_path: Path) -> None:
    class Stubborn(Faulty):
        async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
            pass

    class Sloppy(Planted):
        runtime_class = type("Sloppy", (FaultyRuntime,), {"execution": Stubborn})
        patience = timedelta(seconds=1)

        def make_cleaner(self, context: RuntimeContext) -> Runtime:
            return self.make(context)

        def parent_dir(self) -> Path:
            return tmp_path

    stage: Stage | None = None
    with pytest.raises(AssertionError, match="wait: not done after 0:00:01"):
        async with open_stage(Sloppy()) as stage:
            await stage.stand(stage.place())
    assert stage is not None
    async with open_runtime(stage.context.state_dir):
        # Leaving it ends what runs, its files gone or not.
        pass
