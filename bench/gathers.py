"""gather_rows and gather_cols against torch's index_select and the machine's own copy.

All cases of a shape take turns in one process, after a check that they agree. Bytes are those the
operation cannot avoid: 2·K·C·b for rows, b·R·(C + K) for columns, 2·R·C·b for the copy. The copy
writes into a tensor that exists; the others, as `clone`, make theirs and pay for its pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.start import start
from prunekit.measure.timing import interleave, summarise
from prunekit.ops import gather_cols, gather_rows


@dataclass(frozen=True)
class Case:
    """Keep half of the rows or columns (dim 0 or 1) of a bf16 matrix."""

    dim: int
    rows: int
    columns: int
    ascending: bool = True


CASES = (
    Case(0, 8960, 1536),
    Case(1, 1536, 8960),
    Case(1, 1536, 8960, ascending=False),
    Case(0, 18944, 3584),
    Case(1, 3584, 18944),
)


def measure(case: Case, rounds: int) -> None:
    x = torch.randn(case.rows, case.columns).bfloat16()
    size = x.shape[case.dim]
    index = torch.randperm(size)[: size // 2]
    if case.ascending:
        index = index.sort().values
    op = (gather_rows, gather_cols)[case.dim]
    if not torch.equal(op(x, index), x.index_select(case.dim, index)):
        raise SystemExit(f"{op.__name__} does not agree with index_select on {case}")

    target = torch.empty_like(x)
    cases = {
        "copy_": lambda: target.copy_(x),
        "clone": x.clone,
        "index_select": lambda: x.index_select(case.dim, index),
        op.__name__: lambda: op(x, index),
    }
    seconds = interleave(cases, rounds)
    kept = x.numel() // 2
    moved = 2 * (2 * kept if case.dim == 0 else x.numel() + kept)
    whole = 2 * 2 * x.numel()
    copy = whole / summarise(seconds["copy_"]).median
    theirs = summarise(seconds["index_select"]).median

    what = ("rows", "columns")[case.dim] + (", ascending" if case.ascending else ", in any order")
    print(f"\n[{case.rows}, {case.columns}] bf16, half of the {what}")
    print(f"{'':14} {'median ms':>9} {'p25-p75':>15} {'GB/s':>6} {'of copy_':>8} {'speed-up':>8}")
    for name, values in seconds.items():
        s = summarise(values)
        rate = (whole if name in ("copy_", "clone") else moved) / s.median
        spread = f"{s.low * 1e3:.2f}-{s.high * 1e3:.2f}"
        faster = "" if name in ("copy_", "clone") else f"{theirs / s.median:.2f}"
        print(
            f"{name:14} {s.median * 1e3:9.2f} {spread:>15} {rate / 1e9:6.1f} {rate / copy:8.2f} "
            f"{faster:>8}"
        )


def main() -> None:
    rounds = start(__doc__)
    for case in CASES:
        measure(case, rounds)


if __name__ == "__main__":
    main()
