"""Two revisions against each other: python -m bench.compare --base REV.

REV is checked out beside the working tree, its extension is built, and a process of each runs the
cases of `bench.cases`, the working tree's own, in turn: a busy machine is busy for both. Exit
status 1 where a case is slower by more than allowed: the whole 99.9 % interval lies above that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from bench.cases import SUITES
from prunekit.errors import InputError
from prunekit.measure import gate
from prunekit.measure.provenance import provenance

ROOT = Path(__file__).parents[1]
WARM = 2  # rounds that are not counted


class Side:
    """A process that runs cases under one revision.

    Args:
        tree: the revision's files, with its extension built.
        paths: a folder for what has to be found under another name.
        suites: names in `bench.cases.SUITES`.
    """

    def __init__(self, tree: Path, paths: Path, suites: Sequence[str]):
        paths.mkdir()
        (paths / "prunekit_kernels").symlink_to(tree / "kernels")
        (paths / "prunekit").symlink_to(tree / "prunekit")
        (paths / "bench").symlink_to(ROOT / "bench")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", *suites],
            cwd=paths,
            env=os.environ | {"PYTHONPATH": str(paths), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self._answer()
        self.cases, self.errors = said["cases"], said["errors"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise InputError(f"a worker ended with {self._process.wait()}")
        return json.loads(line)

    def time(self, case: str) -> float:
        """Seconds of one run.

        Raises:
            RuntimeError: it failed.
        """
        self._process.stdin.write(json.dumps({"case": case}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def built(revision: str, folder: Path) -> Path:
    """Check a revision out into a folder and build its extension there.

    Raises:
        InputError: git does not know it, or it does not build.
    """
    quiet = {"check": True, "capture_output": True, "text": True}
    try:
        archive = ["git", "-C", str(ROOT), "archive", "--format=tar", revision]
        tar = subprocess.run(archive, check=True, capture_output=True).stdout
        folder.mkdir()
        subprocess.run(["tar", "-x", "-C", str(folder)], input=tar, check=True)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, **quiet)
    except subprocess.CalledProcessError as error:
        said = error.stderr if isinstance(error.stderr, str) else (error.stderr or b"").decode()
        reason = said.strip().splitlines()[-1] if said.strip() else str(error)
        raise InputError(f"{revision}: {reason}") from None
    return folder


def race(base: Side, head: Side, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of both by case, a round each in turn; the side that begins changes by the round."""
    cases = [case for case in head.cases if case in base.cases]
    taken: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    for round_ in range(WARM + rounds):
        for case in cases:
            pair = [(0, base), (1, head)]
            for which, side in pair if round_ % 2 else reversed(pair):
                seconds = side.time(case)
                if round_ >= WARM:
                    taken[case][which].append(seconds)
    return taken


def report(taken: dict[str, tuple[list[float], list[float]]], most: float) -> int:
    """Print a row a case; 1 where one is slower than allowed."""
    print(f"{'case':34}{'base, ms':>10}{'head, ms':>10}{'change':>9}{'95 %':>18}  verdict")
    slower = 0
    for case, (before, now) in taken.items():
        found = gate.verdict(case, before, now, most)
        slower += found.verdict == gate.REGRESSED
        print(
            f"{case:34}{1e3 * median(before):10.2f}{1e3 * median(now):10.2f}{found.change:+9.1%}"
            f"{found.low:+9.1%}{found.high:+9.1%}  {found.verdict}"
        )
    return int(slower > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    add = parser.add_argument
    add("--base", required=True, metavar="REV", help="what to compare the working tree with")
    add("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    add("--rounds", type=int, default=25)
    add("--max-regression", type=float, default=0.05)
    options = parser.parse_args(arguments)
    if options.rounds < gate.ROUNDS:
        parser.error(f"--rounds: got {options.rounds}; expected at least {gate.ROUNDS}")
    try:
        return compared(options)
    except InputError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2


def compared(options: argparse.Namespace) -> int:
    """Build, race and report; 1 where a case got slower."""
    facts = provenance()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as sides:
        folder = Path(scratch)
        tree = built(options.base, folder / "tree")
        base = Side(tree, folder / "base", options.suite)
        sides.callback(base.close)
        head = Side(ROOT, folder / "head", options.suite)
        sides.callback(head.close)
        for name, side in (("base", base), ("head", head)):
            for suite, why in side.errors.items():
                print(f"{name}: the suite {suite} does not run: {why}", file=sys.stderr)
        print(f"{facts['device']}; torch {facts['versions']['torch']}; base {options.base}")
        return report(race(base, head, options.rounds), options.max_regression)


if __name__ == "__main__":
    sys.exit(main())
