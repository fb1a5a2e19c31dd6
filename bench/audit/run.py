"""The audit from start to end: compile, meter, hold against rules and budgets, print."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import triton

from bench.audit import budgets, cuda, table, traffic
from bench.audit.cases import CASES, find
from bench.audit.compile import CACHE, compile_all
from bench.audit.variants import VARIANTS


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the budgets anew")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of what was compiled")
    return parser.parse_args(arguments)


def run(arguments: list[str]) -> int:
    """Print the tables and what is wrong.

    Returns:
        0 where everything holds, else 1.
    """
    options = _options(arguments)
    begun = time.monotonic()
    metering = traffic.start()
    found = find(CASES + VARIANTS)
    figures, errors = compile_all((one.specialisation for one in found), options.cache)
    rows = budgets.rows(found, figures)
    gathers = cuda.rows(options.cache)
    moved = traffic.finish(metering)

    print(f"Triton {triton.__version__}, {len(found)} specialisations, {len(rows)} rows\n")
    print(table.machine_code(rows) + "\n")
    print(table.excuses() + "\n")
    print(cuda.table(gathers) + "\n")
    print(table.traffic(moved) + "\n")
    print(table.bounds() + "\n")

    wrong = sorted(
        {f"{one.key}: {errors[one.specialisation.key]}" for one in found
         if one.specialisation.key in errors}
    )  # fmt: skip
    wrong += budgets.absolute(rows)
    wrong += cuda.findings(gathers)
    wrong += [line for result in moved for line in result.findings()]
    wrong += hold(rows, options.update)
    for line in wrong:
        print(f"FAILED {line}")
    seconds = time.monotonic() - begun
    print(f"audit: {'failed' if wrong else 'passed'} in {seconds:.0f} s", file=sys.stderr)
    return 1 if wrong else 0


def hold(rows: list[budgets.Row], update: bool) -> list[str]:
    """Write the budgets of this version of Triton, or return what is worse than they are."""
    file = budgets.path()
    if update:
        budgets.write(file, rows)
        print(f"wrote {file.name}")
        return []
    if not file.exists():
        print(f"no budgets for Triton {triton.__version__}: {file.name} is not there; only the "
              f"absolute rules were held")  # fmt: skip
        return []
    worse, better = budgets.compare(rows, budgets.read(file))
    for line in better:
        print(f"better {line}; keep it with --update")
    return worse
