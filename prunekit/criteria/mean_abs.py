"""Mean absolute activation: how strongly a neuron fires on the target."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("mean_abs")
def mean_abs(evidence: Evidence) -> torch.Tensor:
    """Mean over target tokens of abs h."""
    return evidence.target.mean_abs
