"""What a kernel engineer wants to see of the audit, in plain aligned columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bench.audit.binary import load_rank
from bench.audit.budgets import Row
from bench.audit.cases import CASES, MODELS
from bench.audit.traffic import Result
from bench.audit.variants import VARIANTS
from prunekit.measure.roofline import CARDS, predicted_bound

_NAMED_MODEL = MODELS[1]
_NAMED_SPARSITY = 0.35


def aligned(heading: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """Return rows in columns, the first ``left`` flush left and the others flush right."""
    table = [heading, *lines]
    widths = [max(len(row[i]) for row in table) for i in range(len(heading))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, table))


def _mma(opcodes: str) -> str:
    """Shorten to the name and the shape, as in HGMMA.64x64x16 and mfma.32x32x8."""
    return " ".join(
        ".".join(opcode.split(".")[:2])
        if not opcode.startswith("v_")
        else re.sub(r"v_mfma_f32_(\d+x\d+x\d+).*", r"mfma.\1", opcode)
        for opcode in opcodes.split()
    )


def _loads(counts: dict[str, int]) -> str:
    widest_first = sorted(counts, key=load_rank, reverse=True)
    return " ".join(f"{name}×{counts[name]}" for name in widest_first)


def _machine_line(row: Row) -> tuple[str, ...]:
    figures = max(row.figures, key=lambda f: f.registers)
    one = row.found[row.figures.index(figures)]
    budget = row.budget
    others = f" +{len(row.found) - 1}" if len(row.found) > 1 else ""
    return (
        f"  {one.specialisation.name}",
        one.specialisation.arch,
        one.specialisation.config + others,
        _mma(budget["mma"]),
        _loads(figures.loads),
        *(str(budget[name]) for name in ("registers", "spills", "shared", "blocks")),
    )


def machine_code(rows: Iterable[Row]) -> str:
    """One line for each kernel and architecture; dtypes with equal figures share it.

    A key's binaries are shown at the worst of each figure, with the configuration and the loads of
    the one that takes most registers; ``+1`` says that there is another.
    """
    lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in rows:
        place = row.found[0].case.name, _machine_line(row)
        lines.setdefault(place, []).append(row.found[0].dtype)
    table, last = [], ""
    order = list(dict.fromkeys((case, line[0]) for case, line in lines))
    by_kernel = sorted(lines.items(), key=lambda item: order.index((item[0][0], item[0][1][0])))
    for (case, (kernel, arch, *rest)), dtypes in by_kernel:
        if case != last:
            table.append((case, *[""] * 9))
        table.append((kernel, arch, " ".join(dtypes), *rest))
        last = case
    figures = ("registers", "spills", "shared", "blocks")
    heading = ("kernel", "arch", "dtype", "config", "MMA", "loads", *figures)
    return aligned(heading, table, left=6)


def excuses() -> str:
    """Which kernels may load less than 128 bits a thread, which may spill, and why."""
    reasons = {
        f"may {what}: {kernel}, {why}": None
        for case in CASES + VARIANTS
        for what, kernels in (("load narrowly", case.narrow), ("spill", case.spilling))
        for kernel, why in kernels.items()
    }
    return "\n".join(reasons)


def traffic(results: Iterable[Result]) -> str:
    """What was moved against the formula, for each metered run."""
    figures = ("moved", "ideal", "moved/ideal", "at most", "strays")
    heading = ("operation", "kernel", "config of", "shape, fp16", *figures)
    lines = [
        (
            r.operation,
            r.kernel,
            r.arch,
            r.shape,
            f"{r.moved:,}",
            f"{r.ideal:,}",
            f"{r.ratio:.3f}",
            f"{r.limit:.2f}",
            str(r.strays),
        )
        for r in results
    ]
    return aligned(heading, lines, left=4)


def bounds() -> str:
    """The predicted bound of each operation for one shape, on each card."""
    model, width = _NAMED_MODEL, _NAMED_MODEL.kept(_NAMED_SPARSITY)
    lines = []
    for case in CASES:
        moved, flops = case.cost(case.tokens, model.hidden_size, width)
        each = [predicted_bound(card, moved, flops) for card in CARDS]
        lines.append(
            (
                case.name,
                *(f"{b.seconds * 1e6:.1f} µs ({b.binds})" for b in each),
                str(case.tokens),
                f"{moved / 1e6:.1f}",
                f"{flops / 1e9:.1f}",
            )
        )
    heading = ("operation", *(f"{c.name} predicted bound" for c in CARDS), "T", "MB", "GFLOP")
    title = (
        f"{model.name} at {_NAMED_SPARSITY:.0%} sparsity (D {model.hidden_size}, F {width}), "
        f"16-bit; nothing here was measured"
    )
    return f"{title}\n{aligned(heading, lines, left=4)}"
