"""What a repair is, and what every repair needs of a dense MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prunekit.arch import MLPView
from prunekit.batching import Batch
from prunekit.errors import InputError
from prunekit.stats import NeuronStats

# Told of a batch of the calibration's prompts and a model's logits on it, [B, S, V].
Heard = Callable[[Batch, torch.Tensor], None]


@dataclass(frozen=True)
class Repair:
    """What replaces a down projection: weight [D, F'] and bias [D] (None: as it was), fp64."""

    down: torch.Tensor
    bias: torch.Tensor | None = None


def check_statistics(method: str, views: Sequence[MLPView], stats: NeuronStats | None) -> None:
    """Raise InputError unless a repair has statistics, and of this model."""
    if method == "none":
        return
    if stats is None:
        raise InputError(f"compensate {method}: needs statistics; pass stats or a target")
    stats.check_model(views)


def check_prompts(method: str, views: Sequence[MLPView], stats: NeuronStats) -> None:
    """Raise InputError unless a method can run the model over the calibration's prompts again."""
    if stats.prompts is None:
        raise InputError(
            f"compensate {method}: the statistics hold no prompts; calibrate with --gram"
        )
    for view in views:
        if not view.readable:
            raise InputError(
                f"compensate {method}: {view.name} is offloaded or quantised "
                f"({view.gate.dtype}); use lstsq"
            )


def dense_down(view: MLPView) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The down projection's weight [D, F] and bias [D] or None, fp64, on the CPU."""
    bias = view.down_bias
    return view.down.detach().double().cpu(), None if bias is None else bias.detach().double().cpu()


def removed_mask(width: int, kept: torch.Tensor) -> torch.Tensor:
    """[F], bool: which neurons go."""
    removed = torch.ones(width, dtype=torch.bool)
    removed[kept] = False
    return removed
