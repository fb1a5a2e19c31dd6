"""python -m bench.gpu: check and time every operation, or tune its kernels, and write it down."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from bench.gpu.ahead import compile_ahead
from bench.gpu.shapes import SUITES
from bench.gpu.supervise import supervise
from prunekit.errors import InputError

RESULTS = Path(__file__).parents[1] / "results"
_COMPILE_AHEAD_S = 120.0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the steps")
    add("--shapes", choices=tuple(SUITES), default="models")
    add("--out", type=Path, help="folder of the results (default: bench/results)")
    add("--only", nargs="+", default=[""], help="only entries whose name contains one of these")
    add("--rounds", type=int, default=25, help="timings of each contender")
    add("--budget-s", type=float, default=480.0, help="begin nothing new after so many seconds")
    add("--patience-s", type=float, default=150.0, help="start anew when nothing happened so long")
    add("--tune", action="store_true", help="look for faster configurations instead")
    add("--kernels", nargs="+", help="tune these alone, by their names in the table")
    add("--candidates", type=int, help="try so many configurations of a kernel at the most")
    add("--tuned", type=Path, help="table that --tune extends (default: kernels/tuned.json)")
    add("--max-autotune", action="store_true", help="time torch.compile's slow mode too")
    add("--compiler", default="inductor", help="torch.compile's backend")
    add("--compilers", type=int, help="processes that compile ahead (default: 8 at most)")
    add("--revision", help="of the sources, where git does not know it")
    for private in ("--worker", "--resume"):
        add(private, action="store_true", help=argparse.SUPPRESS)
    add("--deadline", type=float, help=argparse.SUPPRESS)
    add("--share", help=argparse.SUPPRESS)
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; ``arguments`` among them are those that a person gave."""
    given = parser()
    options = given.parse_args(arguments)
    if options.device == "cpu" and options.out is None:
        given.error("--out: a rehearsal needs a folder of its own; bench/results is for GPUs")
    options.out = options.out or RESULTS
    if options.compilers is None:
        options.compilers = min(8, (os.cpu_count() or 1) // 2) if options.device == "cuda" else 0
    private = "--worker", "--resume", "--deadline", "--share"
    options.arguments = [a for a in arguments if not a.startswith(private)]
    return options


def work(options: argparse.Namespace) -> int:
    """Do everything in this process; return the exit status, 1 where something failed."""
    import torch

    from bench.gpu.run import Run, check_all, compile_all, measure_all
    from bench.gpu.tune_run import tune_all

    torch.manual_seed(0)
    run = Run(options)
    with torch.no_grad():
        steps = (check_all, compile_all) if options.share else (check_all, measure_all)
        for step in (tune_all,) if options.tune else steps:
            step(run)
    return run.finish()


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # the workers read it as they import triton
    if options.worker:
        try:
            return work(options)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2

    import torch

    from bench.gpu.run import results_path

    if options.device == "cuda" and not torch.cuda.is_available():
        print("python -m bench.gpu: torch sees no GPU; --device cpu rehearses", file=sys.stderr)
        return 2
    deadline = time.time() + options.budget_s
    if options.compilers and not options.tune:
        print(f"compiling ahead in {options.compilers} processes", flush=True)
        compile_ahead(arguments, options.compilers, _COMPILE_AHEAD_S)
    command = [sys.executable, "-m", "bench.gpu", *arguments, "--worker", f"--deadline={deadline}"]
    return supervise(command, results_path(options), options.patience_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
