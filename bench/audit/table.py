"""What a kernel engineer wants to see of the audit, in plain aligned columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.audit.binary import load_rank
from bench.audit.budgets import Row
from bench.audit.cases import CASES, MODELS
from bench.audit.traffic import Result
from prunekit.measure.roofline import CARDS, predicted_bound

_NAMED_MODEL = MODELS[1]
_NAMED_SPARSITY = 0.35


def aligned(heading: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """Return rows in columns, the first ``left`` of them to the left and the others to the right."""
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
    """Shorten to the name and the shape, as in HGMMA.64x64x16."""
    return " ".join(
        opcode if opcode.startswith("v_") else ".".join(opcode.split(".")[:2])
        for opcode in opcodes.split()
    )


def _loads(counts: dict[str, int]) -> str:
    widest_first = sorted(counts, key=load_rank, reverse=True)
    return " ".join(f"{name}×{counts[name]}" for name in widest_first)


def _machine_line(row: Row) -> tuple[str, ...]:
    figures = max(row.figures, key=lambda f: f.registers)
    one = row.found[row.figures.index(figures)]
    budget = row.budget
    kernel, arch, dtype = row.key.split()
    others = f" +{len(row.found) - 1}" if len(row.found) > 1 else ""
    return (
        kernel,
        arch,
        dtype,
        one.specialisation.config + others,
        _mma(budget["mma"]),
        _loads(figures.loads),
        str(budget["registers"]),
        str(budget["spills"]),
        str(budget["shared"]),
        str(budget["blocks"]),
    )


def machine_code(rows: Iterable[Row]) -> str:
    """One line for each kernel, architecture and dtype; equal lines of two dtypes share one."""
    lines: dict[tuple[str, ...], str] = {}
    for name, arch, dtype, *rest in map(_machine_line, rows):
        place = (name, arch, *rest)
        lines[place] = f"{lines[place]} {dtype}" if place in lines else dtype
    heading = "kernel arch dtype config MMA loads registers spills shared blocks".split()
    return aligned(
        heading, [(n, a, dtype, *rest) for (n, a, *rest), dtype in lines.items()], left=6
    )


def traffic(results: Iterable[Result]) -> str:
    """What was moved against the formula, for each metered run."""
    heading = ("operation", "config of", "shape", "moved", "ideal", "ratio", "limit", "strays")
    lines = [
        (
            r.operation,
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
    return aligned(heading, lines, left=3)


def bounds() -> str:
    """The predicted bound of each operation for one shape, on each card."""
    model, width = _NAMED_MODEL, _NAMED_MODEL.kept(_NAMED_SPARSITY)
    lines = []
    for case in CASES:
        moved, flops = case.cost(case.tokens, model.hidden_size, width)
        each = [predicted_bound(card, moved, flops) for card in CARDS]
        lines.append(
            (
                case.operation,
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
