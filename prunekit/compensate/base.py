"""What a repair is, and what every repair needs of a dense MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prunekit.arch import MLPView


@dataclass(frozen=True)
class Repair:
    """What replaces a down projection: weight [D, F'] and bias [D] (None: as it was), fp64."""

    down: torch.Tensor
    bias: torch.Tensor | None = None


def dense_down(view: MLPView) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The down projection's weight [D, F] and bias [D] or None, fp64, on the CPU."""
    bias = view.down_bias
    return view.down.detach().double().cpu(), None if bias is None else bias.detach().double().cpu()


def removed_mask(width: int, kept: torch.Tensor) -> torch.Tensor:
    """[F], bool: which neurons go."""
    removed = torch.ones(width, dtype=torch.bool)
    removed[kept] = False
    return removed
