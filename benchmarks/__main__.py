"""``python -m benchmarks``: runs scenarios, prints tables and one JSON object each, draws plots."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

from benchmarks import plots, report, scenarios
from benchmarks.system import Bench, Unavailable, environment

HERE = Path(__file__).parent
COMMITTED = HERE / "results"


def _scenarios() -> dict[str, ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(scenarios.__path__))
    return {name: importlib.import_module(f"benchmarks.scenarios.{name}") for name in names}


def main() -> int:
    """Runs the benchmarks; returns 1 where a scenario broke (a missed bound is a finding, not a failure)."""
    known = _scenarios()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("scenario", nargs="*", choices=[[], *known], help="all, unless some are named")
    parser.add_argument("--quick", action="store_true", help="small sizes, the quick scenarios only")
    parser.add_argument("--save", action="store_true", help="write ratios and plots where they are committed")
    parser.add_argument("--out", type=Path, help="write JSON lines and plots into this directory")
    options = parser.parse_args()
    chosen = options.scenario or [name for name, module in known.items() if module.QUICK or not options.quick]
    results: list[report.Result] = []
    broken = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lessor-bench-") as directory:
        # PostgreSQL runs as a user of its own where we are root.
        Path(directory).chmod(0o755)
        bench = Bench(quick=options.quick, directory=Path(directory))
        for name in chosen:
            print(f"{name} …", file=sys.stderr, flush=True)
            try:
                result = known[name].run(bench)
            except Unavailable as missing:
                print(f"{name}: left out: {missing}\n")
                continue
            except Exception as error:  # one broken scenario must not hide the others' figures
                broken.append(name)
                print(f"{name}: BROKEN: {type(error).__name__}: {error}\n", flush=True)
                continue
            results.append(result)
            print(result.text() + "\n")
            print(result.json_line() + "\n", flush=True)
    kind = "quick" if options.quick else "full"
    committed = COMMITTED / f"{kind}.json"
    print(f"ratios beside the last committed ones ({committed.relative_to(HERE.parent)}):")
    print(report.compare(results, report.read_committed(committed)))
    print(f"\n{len(results)} scenario(s) in {time.monotonic() - began:.0f} s")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{kind}.jsonl").write_text("".join(result.json_line() + "\n" for result in results))
        report.write_ratios(options.out / f"{kind}.json", results, environment())
        plots.draw(results, options.out)
    if options.save:
        COMMITTED.mkdir(exist_ok=True)
        report.merge_ratios(committed, results, environment())
        plots.draw(results, HERE.parent / "docs" / "images")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
