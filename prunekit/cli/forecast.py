"""What a prune will take, said before it begins and by --dry-run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from prunekit.batching import Tokens, encode
from prunekit.cli.output import Output
from prunekit.cli.sources import joined
from prunekit.config import PruneConfig
from prunekit.corpus import Corpus
from prunekit.measure.cost import (
    Phase,
    Rates,
    Shape,
    Work,
    measure_rates,
    predict,
    spilled_bytes,
)
from prunekit.measure.provenance import device_name

PROMPTS, LENGTH = 200, 180  # of a corpus that is not named


@dataclass(frozen=True)
class Forecast:
    """A prediction, and what it was made from."""

    work: Work
    rates: Rates
    phases: list[Phase]
    output_bytes: int
    statistics_bytes: int
    spilled_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def peak_bytes(self) -> float:
        """The most that is held at a time."""
        return max(phase.bytes for phase in self.phases)

    def facts(self) -> dict:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "device": device_name(),
        }

    def line(self) -> str:
        """In one line."""
        work = self.work
        text = f"{work.prompts:,} prompts, {work.tokens:,} tokens: " if work.tokens else ""
        spilled = f", {gigabytes(self.spilled_bytes)} more meanwhile" if self.spilled_bytes else ""
        return (
            f"predicted {text}{duration(self.seconds)}, peak memory {gigabytes(self.peak_bytes)}, "
            f"{gigabytes(self.output_bytes)} on disk{spilled}"
        )

    def show(self, output: Output) -> None:
        """As a table with a row a phase."""
        rows = [
            (p.name, f"{p.flops / 1e12:,.2f}", duration(p.seconds), gigabytes(p.bytes))
            for p in self.phases
        ]
        rows.append(
            (
                "all",
                f"{sum(p.flops for p in self.phases) / 1e12:,.2f}",
                duration(self.seconds),
                gigabytes(self.peak_bytes),
            )
        )
        output.table(self.line(), ("phase", "TFLOP", "time", "memory"), rows)
        r = self.rates
        output.line(
            f"from rates measured now on {device_name()}: products {r.products / 1e9:,.0f} and in "
            f"fp32 {r.wide / 1e9:,.0f} GFLOP/s, fp64 Cholesky {r.fp64 / 1e9:,.0f}, copy "
            f"{r.copy / 1e9:,.0f} GB/s; statistics, if saved: {gigabytes(self.statistics_bytes)}"
        )


def counted(
    config: PruneConfig, tokenizer: Any, target: list[Corpus], distractors: list[Corpus]
) -> tuple[list[Tokens], list[Tokens]]:
    """The target's and the distractors' prompts; made up where there is no target."""
    if not target:
        return [Tokens((0,) * LENGTH)] * PROMPTS, []
    found, others = (
        encode(joined(many), tokenizer, config.max_length) if many else []
        for many in (target, distractors)
    )
    return found, others


def forecast(model: nn.Module, work: Work, widths: Sequence[int]) -> Forecast:
    """Predict a run of this model, which may lie on the meta device, on this machine.

    Cost:
        A second or two of measuring.
    """
    shape = Shape.of(model)
    weight = model.get_input_embeddings().weight
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = measure_rates(shape, weight.dtype, device)
    phases = predict(shape, rates, work, widths)
    grams = sum(width**2 for width, _ in shape.mlps) if work.gram else 0
    metrics = len(shape.mlps) * shape.hidden**2 if work.gradients else 0
    plain = 8 * 7 * sum(width for width, _ in shape.mlps)
    statistics = 4 * (grams + metrics) + plain
    spilled = spilled_bytes(shape, work)
    return Forecast(work, rates, phases, shape.pruned_bytes(widths), statistics, spilled)


def duration(seconds: float) -> str:
    """Readably: 12 s, 3 min 20 s, 5.3 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds / 3600:,.1f} h"


def gigabytes(value: float) -> str:
    """Bytes as GB (10⁹)."""
    return f"{value / 1e9:,.2f} GB" if value < 1e11 else f"{value / 1e9:,.0f} GB"
