"""The figures that every kernel has to keep, by Triton's version, and what a change did to them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from bench.audit.binary import Figures, load_bits, load_rank
from bench.audit.cases import Found

FOLDER = Path(__file__).parents[1] / "budgets"
_MOST = ("registers", "spills", "shared")
_LEAST_LOAD_BITS = 128

Budget = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """All binaries of one key, at the worst of each figure."""

    key: str
    found: tuple[Found, ...]
    figures: tuple[Figures, ...]

    @property
    def budget(self) -> Budget:
        return {
            **{name: max(getattr(f, name) for f in self.figures) for name in _MOST},
            "blocks": min(f.blocks for f in self.figures),
            "mma": " ".join(sorted({f.mma for f in self.figures} - {""})),
            "load": min((f.load for f in self.figures), key=load_rank),
        }


def rows(found: Iterable[Found], figures: dict[str, Figures]) -> list[Row]:
    """Group what compiled by its key, in the order it was found."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        if one.specialisation.key in figures:
            groups.setdefault(one.key, []).append(one)
    return [
        Row(key, tuple(group), tuple(figures[one.specialisation.key] for one in group))
        for key, group in groups.items()
    ]


def path(version: str = triton.__version__) -> Path:
    """Return the file for a version of Triton, whose last part does not count."""
    return FOLDER / f"triton-{'.'.join(version.split('.')[:2])}.json"


def read(file: Path) -> dict[str, Budget]:
    return json.loads(file.read_text())


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write one line for each row, so that a difference reads well."""
    lines = [f"  {json.dumps(row.key)}: {json.dumps(row.budget)}" for row in rows]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def absolute(rows: Iterable[Row]) -> list[str]:
    """Return what breaks the rules that need no budget: spills, tensor cores, wide loads."""
    lines = []
    for row in rows:
        first = row.found[0]
        case, kernel, dtype = first.case, first.specialisation.name, first.dtype
        names = {kernel, f"{kernel} {dtype}"}
        spilled = max(f.spills for f in row.figures)
        if spilled and not names & case.spilling.keys():
            lines.append(f"{row.key}: spills {spilled} bytes, expected none")
        exact = dtype == "fp32"  # which NVIDIA's tensor cores do not multiply
        if kernel in case.products and not exact and not all(f.mma for f in row.figures):
            lines.append(f"{row.key}: no tensor-core opcode")
        load = row.budget["load"]
        if not names & case.narrow.keys() and load_bits(load) < _LEAST_LOAD_BITS:
            lines.append(f"{row.key}: widest load is {load or 'none'}, expected 128 bits")
    return lines


def compare(rows: Iterable[Row], budgets: dict[str, Budget]) -> tuple[list[str], list[str]]:
    """Return what is worse than its budget, and what is better."""
    worse, better = [], []
    rows = list(rows)
    for row in rows:
        if row.key not in budgets:
            worse.append(f"{row.key}: has no budget")
            continue
        for name, was in budgets[row.key].items():
            now = row.budget[name]
            if now != was:
                moved = f"{row.key}: {name} {was or 'none'} -> {now or 'none'}"
                order = _improves(name, was, now)
                (better if order else worse).append(f"{moved} (budget {was or 'none'})")
    gone = budgets.keys() - {row.key for row in rows}
    return worse + [f"{key}: has a budget, but no kernel" for key in sorted(gone)], better


def _improves(name: str, was: Any, now: Any) -> bool:
    if name in _MOST:
        return now < was
    if name == "load":
        return load_rank(now) > load_rank(was)
    return name == "blocks" and now > was  # another tensor-core opcode is another kernel
