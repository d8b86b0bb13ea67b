"""The schedule is drawn from the seed alone, and breaks no assumption of the protocol. The mutants fit the source."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.chaos.faults import INJURIES
from tests.chaos.mutants import MUTANTS
from tests.chaos.overlay import Edit, EditDoesNotFit, make_overlay
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.schedule import APART_S, KINDS, LAST_S, RENEWED_S, Planned, draw_schedule, fits

pytestmark = pytest.mark.unit


def test_a_seed_draws_the_same_faults_again() -> None:
    first = draw_schedule(5, 600, agents=5, replicas=2)
    assert first == draw_schedule(5, 600, agents=5, replicas=2)
    assert first != draw_schedule(6, 600, agents=5, replicas=2)


def test_half_an_hour_has_faults_of_every_kind_in_time() -> None:
    drawn = draw_schedule(1, 1800, agents=5, replicas=2)
    assert len(drawn) >= 200
    assert {planned.kind for planned in drawn} == {kind.name for kind in KINDS}
    assert all(planned.until_s <= 1800 and planned.at_s <= 1800 - LAST_S for planned in drawn)
    assert {planned.target for planned in drawn if planned.whom.startswith("agent")} == set(range(5))


@pytest.mark.parametrize("seed", range(10))
def test_no_assumption_of_the_protocol_is_broken(seed: int) -> None:
    drawn = draw_schedule(seed, 600, agents=3, replicas=2)
    for one, other in itertools.permutations(drawn, 2):
        # How long one was healed when the other began, or the other way round; below zero: at work together.
        apart_s = max(other.at_s - one.until_s, one.at_s - other.until_s)
        if one.kind == "keeper kill" and one.whom == other.whom and other.part == "agent":
            assert apart_s >= APART_S
        beside = one.whom == other.whom or other.part in ("server", "postgres")
        if one.kind == "keeper long stop" and beside and other.part != "keeper":
            assert apart_s >= (1.0 if other.at_s > one.at_s else RENEWED_S)
        if (one.whom, one.part) == (other.whom, other.part):
            assert apart_s >= 1.0


def test_a_keeper_is_not_stopped_for_long_near_a_partition_of_its_agent() -> None:
    partition = Planned("partition", 2, 50.0, 10.0)
    assert not fits(Planned("keeper long stop", 2, 45.0, 10.0), [partition])
    assert not fits(Planned("keeper long stop", 2, 71.0, 10.0), [partition])
    assert fits(Planned("keeper long stop", 2, 72.0, 10.0), [partition])
    assert fits(Planned("keeper long stop", 2, 38.0, 10.0), [partition])
    assert fits(Planned("keeper long stop", 1, 50.0, 10.0), [partition])


def test_every_kind_is_done_somehow() -> None:
    assert {kind.name for kind in KINDS} == set(INJURIES)


def test_every_mutant_has_its_scenario_and_every_scenario_its_mutant() -> None:
    assert {mutant.scenario for mutant in MUTANTS} == set(SCENARIOS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_source_and_leaves_it_alone(mutant: object, tmp_path: Path) -> None:
    assert mutant in MUTANTS
    edits = next(one.edits for one in MUTANTS if one is mutant)
    overlay = make_overlay(tmp_path, edits)
    for edit in edits:
        assert edit.new in (overlay / edit.path).read_text(encoding="utf-8")
        if edit.path.endswith(".py"):
            compile((overlay / edit.path).read_text(encoding="utf-8"), edit.path, "exec")
    make_overlay(tmp_path / "healthy", edits)


def test_the_page_lists_the_mutants() -> None:
    page = (Path(__file__).parents[2] / "docs" / "verification.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- mutants -->\n\n")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rest.partition("\n\n")[0].splitlines()[2:]]
    told = {(name.strip("`"), rule, scenario.strip("`"), caught) for name, rule, scenario, caught in rows}
    assert told == {
        (mutant.name, mutant.rule, mutant.scenario, ", ".join(sorted(mutant.caught_as))) for mutant in MUTANTS
    }


def test_an_edit_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EditDoesNotFit, match="holds 0 times"):
        make_overlay(tmp_path, [Edit("lessor/timing.py", "no such text", "")])
