"""prunekit's own suite: every operation and the main job here, and the GPU kernels' static budgets.

Each case of `bench.cases` takes turns with itself by the references, which are plain torch: what is
gained is ours. The audit compiles and meters the GPU kernels in a process of its own, before. All
goes to OUT/suite.md, and the figures with their provenance to OUT/suite.json. Exit status 1 where
the audit fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench.cases import SUITES
from prunekit.files import replacing_file, write_json
from prunekit.measure.provenance import provenance
from prunekit.measure.timing import confidence, interleave
from prunekit.ops.registry import force_backend

OURS, REFERENCE = "ours", "reference"
LEAST = 7  # rounds: fewer give no interval of 95 %


@dataclass(frozen=True)
class Row:
    """A case: milliseconds as it is served, and by the references; medians with 95 % intervals."""

    case: str
    ms: float
    interval: tuple[float, float]
    reference_ms: float
    reference_interval: tuple[float, float]
    speedup: float
    speedup_interval: tuple[float, float]


def referenced(case: Callable[[], object]) -> Callable[[], None]:
    """The case by the references alone."""

    def run() -> None:
        with force_backend("reference"):
            case()

    return run


def measure(cases: dict[str, Callable[[], object]], rounds: int, limit_s: float) -> list[Row]:
    """Time every case both ways, a round each in turn, for so many rounds or until time is up."""
    both = {(name, OURS): case for name, case in cases.items()}
    both |= {(name, REFERENCE): referenced(case) for name, case in cases.items()}
    until = time.monotonic() + limit_s
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in both}
    interleave(both, 0, warmup=1)
    for done in range(rounds):
        if done >= LEAST and time.monotonic() >= until:
            break
        for key, seconds in interleave(both, 1, warmup=0).items():
            taken[key] += [1e3 * s for s in seconds]
    return [row(name, taken[name, OURS], taken[name, REFERENCE]) for name in cases]


def row(case: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Medians and intervals of milliseconds, round by round."""
    gains = [t / o for o, t in zip(ours, theirs, strict=True)]
    sides = [(median(side), confidence(side)) for side in (ours, theirs, gains)]
    return Row(case, *(value for side in sides for value in side))


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| case | ms | 95 % | plain torch, ms | 95 % | speed-up | 95 % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        cells = [r.case]
        for value, (low, high), unit in (
            (r.ms, r.interval, ""),
            (r.reference_ms, r.reference_interval, ""),
            (r.speedup, r.speedup_interval, " ×"),
        ):
            cells += [f"{value:.2f}{unit}", f"{low:.2f} – {high:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def audit() -> tuple[bool, str]:
    """Whether the GPU kernels keep their budgets, and the tables that say so."""
    command = [sys.executable, "-m", "bench.audit"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.returncode == 0, found.stdout + found.stderr.strip().rpartition("\n")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    add = parser.add_argument
    add("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    add("--rounds", type=int, default=25)
    add("--limit-s", type=float, default=240.0, help=f"no round after this, but {LEAST} at least")
    add("--no-audit", action="store_true", help="leave the GPU kernels out")
    add("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args(arguments)
    if options.rounds < LEAST:
        parser.error(f"--rounds: got {options.rounds}; expected at least {LEAST}")
    begun, facts = time.monotonic(), provenance()
    kept, said = (True, "left out (--no-audit)") if options.no_audit else audit()
    cases = {n: c for suite in options.suite for n, c in SUITES[suite]().items()}
    rows = measure(cases, options.rounds, options.limit_s)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text = (
        f"# prunekit's own speed\n\n{facts['device']}, {facts['cpu_isa'] or 'no extension'}; "
        f"{versions}; revision {facts.get('revision', 'unknown')}"
        f"{' with changes' if facts.get('dirty') else ''}.\n\n{table(rows)}\n"
        "ms: median of interleaved rounds, with its 95 % interval. plain torch: the same case by "
        "the references.\n\n## The GPU kernels' static budgets\n\n"
        f"Compiled and metered without a GPU; nothing here is a time.\n\n```\n{said.strip()}\n```\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing_file(options.out / "suite.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    figures = {"rows": [asdict(r) for r in rows], "audit_kept": kept, "provenance": facts}
    write_json(options.out / "suite.json", figures)
    print(text)
    print(f"{options.out / 'suite.md'}, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
