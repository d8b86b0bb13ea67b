"""Scenarios: each module has what the frame asks of it, and what can be tested without a database."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

from benchmarks import idle_transaction, planner_cost, scenarios
from benchmarks.idle_transaction import Held
from benchmarks.report import Result
from benchmarks.scenarios.recovery import LeaseTime
from benchmarks.system import Bench

pytestmark = pytest.mark.unit

NAMES = sorted(module.name for module in pkgutil.iter_modules(scenarios.__path__))


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_has_a_title_says_whether_it_is_quick_and_runs(name: str) -> None:
    module = importlib.import_module(f"benchmarks.scenarios.{name}")
    assert isinstance(module.TITLE, str)
    assert module.TITLE
    assert isinstance(module.QUICK, bool)
    assert module.run.__annotations__ == {"bench": "Bench", "return": "Result"}
    assert (module.Bench, module.Result) == (Bench, Result)


def test_all_nine_scenarios_are_there() -> None:
    wanted = {"drain", "submit", "latency", "idle_fleet", "growth", "reads", "recovery", "processes", "scale_out"}
    assert wanted <= set(NAMES)


def test_some_scenarios_are_quick() -> None:
    quick = {name for name in NAMES if importlib.import_module(f"benchmarks.scenarios.{name}").QUICK}
    assert {"drain", "processes"} <= quick
    assert quick.isdisjoint({"growth", "reads", "recovery"})


def test_claims_are_found_in_the_log_of_postgresql(tmp_path: Path) -> None:
    log = tmp_path / "postgres.log"
    claim = "WITH lead AS (SELECT 1),\n\tmade AS (\n\tSELECT nextval('lease_number')\n\t) SELECT 1"
    before = f"1000.000 LOG:  duration: 9.000 ms  execute __a__: {claim}\n"
    log.write_text(
        before + f"1001.000 LOG:  duration: 0.200 ms  bind __a__: {claim}\n"
        f"1001.250 LOG:  duration: 2.000 ms  execute __a__: {claim}\n"
        "1001.500 LOG:  duration: 7.000 ms  execute __b__: SELECT last_value FROM lease_number\n"
        f"1002.000 LOG:  duration: 0.400 ms  bind __a__: {claim}\n"
        f"1002.250 LOG:  duration: 3.000 ms  execute __a__: {claim}\n"
        "1003.000 ERROR:  deadlock detected\n"
    )
    found = list(idle_transaction.logged_claims(log, skip=len(before)))
    assert [at for at, _ in found] == [1001.25, 1002.25]
    assert [ms for _, ms in found] == pytest.approx([2.3, 3.3])


def test_the_claim_is_the_only_statement_that_is_taken_for_one() -> None:
    from lessor_server.store import statements

    folder = Path(statements.__file__).parent / "sql"
    having = [path.name for path in folder.rglob("*.sql") if idle_transaction.CLAIM in path.read_text()]
    assert having == ["claim.sql"]


def test_a_backlog_is_told_in_seconds_of_the_load_and_claims_by_their_part_of_the_time() -> None:
    held = Held(100, 10.0, 1000, backlogs=[0] * 18 + [50, 150], claims=[(1.0, 2.0), (9.0, 4.0), (9.5, 6.0)])
    assert held.backlog_s() == 1.0
    assert held.claim_ms(0.5) == 4.0
    assert held.claim_ms(0.0, since=0.8) == 4.0
    rows = list(held.rows("loaded", parts=2))
    assert [row["seconds"] for row in rows] == ["0 to 5", "5 to 10"]
    assert [row["claims logged"] for row in rows] == [1, 2]
    assert [row["backlog max"] for row in rows] == [0, 150]


def test_lease_time_is_passed_when_it_was_first_seen_beyond() -> None:
    lease_time = LeaseTime()
    for ms, at_s in ((1000, 50.0), (1000, 50.1), (1250, 50.3), (2250, 51.4)):
        lease_time.note(ms, at_s)
    assert lease_time.passed_s(999) == 50.0
    assert lease_time.passed_s(1000) == 50.3
    assert lease_time.passed_s(1250.5) == 51.4
    with pytest.raises(RuntimeError, match="before its lease ran out"):
        lease_time.passed_s(2250)


def test_the_planner_is_timed_on_what_the_server_would_give_it() -> None:
    few, many = planner_cost.rows([2], [10, 3000])
    assert (few["free fleet: granted"], many["free fleet: granted"]) == (10, 1000)
    assert all(isinstance(row["ms"], float) for row in (few, many))
