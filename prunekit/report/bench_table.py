"""A benchmark's rows: as text for people, and as numbers under names that say their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunekit.integrations.loading import TORCH_DTYPES
from prunekit.measure.comparison import Throughput
from prunekit.ops.linear import multiplies


@dataclass(frozen=True)
class Line:
    """A row of a benchmark, and its model's size.

    Attributes:
        row: what was measured.
        parameters: of the model. bytes: of its weights.
        peak_bytes: what loading and running it added to a fresh process; None if not measured.
    """

    row: Throughput
    parameters: int
    bytes: int
    peak_bytes: int | None

    @property
    def label(self) -> str:
        """What tells it from the others in a sentence."""
        row = self.row
        return f"{row.model}, {row.dtype}, {row.test}, batch {row.batch}"


def columns_and_cells(lines: Sequence[Line]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table, as llama-bench has it, with the model's size and memory beside its speed.

    The engine is named where it is not the same for all.
    """
    several = len({line.row.engine for line in lines}) > 1
    engine = ("engine",) if several else ()
    columns = ("model", *engine, "dtype", "params\nM", "size\nMB", "peak\nMB", "batch", "test")
    columns += ("tokens/s", "95 %", "speed-up", "95 %", "bound", "reached")
    return columns, [_cells(line, several) for line in lines]


def _cells(line: Line, several: bool) -> tuple[str, ...]:
    row, bound = line.row, line.row.bound
    return (
        row.model,
        *((row.engine,) if several else ()),
        row.dtype,
        f"{line.parameters / 1e6:,.1f}",
        f"{line.bytes / 1e6:,.1f}",
        "–" if line.peak_bytes is None else f"{line.peak_bytes / 1e6:,.1f}",
        str(row.batch),
        row.test,
        f"{row.tokens_per_s:.1f}",
        "{:.1f} – {:.1f}".format(*row.tokens_interval),
        f"{row.speedup:.2f} ×",
        "{:.2f} – {:.2f}".format(*row.speedup_interval),
        "–" if bound is None else f"{bound.speedup:.2f} ×",
        "–" if bound is None else f"{bound.reached:.0%}",
    )


def flat(line: Line) -> dict[str, Any]:
    """A row for machines."""
    row, bound, parts = line.row, line.row.bound, line.row.parts
    low, high = row.tokens_interval
    slowest, fastest = row.speedup_interval
    latency_ms = 1e3 * row.latency_s
    return {
        "model": row.model,
        "engine": row.engine,
        "dtype": row.dtype,
        "parameters": line.parameters,
        "bytes": line.bytes,
        "peak_bytes": line.peak_bytes,
        "batch": row.batch,
        "test": row.test,
        "tokens_per_s": row.tokens_per_s,
        "tokens_per_s_low": low,
        "tokens_per_s_high": high,
        "ttft_ms": latency_ms if row.test.startswith("pp") else None,
        "tpot_ms": latency_ms if row.test.startswith("tg") else None,
        "joules_per_token": row.joules_per_token,
        "speedup": row.speedup,
        "speedup_low": slowest,
        "speedup_high": fastest,
        "bound": None if bound is None else bound.speedup,
        "reached": None if bound is None else bound.reached,
        "mlp_share": None if parts is None else parts.mlp / parts.total,
    }


def sentences(lines: Sequence[Line]) -> list[str]:
    """What is slow for another reason, what a token costs in energy where that is counted, and
    whether pruning paid and why."""
    slow = [
        f"{name}: this processor has no instructions for it; --dtype fp32 is faster here"
        for name in dict.fromkeys(line.row.dtype for line in lines if line.row.parts)
        if not torch.cuda.is_available() and not multiplies(TORCH_DTYPES.get(name))
    ]
    energy = [
        f"{line.label}: {line.row.joules_per_token:.3g} J a token, idling included"
        for line in lines
        if line.row.joules_per_token is not None
    ]
    why = [f"{line.label}: {line.row.bound.why}." for line in lines if line.row.bound is not None]
    return slow + energy + why


def how(facts: Mapping[str, Any], rounds: int) -> str:
    """What the table was measured on, and what its columns mean."""
    return (
        f"{facts['device']}; torch {facts['versions']['torch']}; median of {rounds} interleaved "
        "rounds, with 95 % intervals; speed-up: over the first model in the same engine; bound: "
        "the speed-up that the removed weights allow if nothing else gets faster; peak: what "
        "loading and running added to a fresh process"
    )
