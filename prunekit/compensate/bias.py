"""Repair by the mean alone: the down projection's bias takes what the removed neurons gave."""

from __future__ import annotations

import torch

from prunekit.arch import MLPView
from prunekit.compensate.base import Repair, dense_down, removed_mask
from prunekit.stats import NeuronSums


def bias(view: MLPView, sums: NeuronSums, kept: torch.Tensor) -> Repair:
    """Add what the removed neurons gave on average: b + W·mean(h) over the removed.

    Source:
        FLAP, An et al., arXiv 2312.11983, equation 5.
    """
    down, before = dense_down(view)
    removed = removed_mask(view.width, kept)
    offset = down[:, removed] @ sums.token_mean[removed]
    return Repair(down[:, kept], offset if before is None else before + offset)
