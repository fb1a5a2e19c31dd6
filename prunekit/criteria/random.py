"""Random scores: the control that every criterion has to beat."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("random", needs=())
def random(evidence: Evidence) -> torch.Tensor:
    """Uniform in [0, 1), drawn for each MLP from the seed and the MLP's position."""
    generator = torch.Generator().manual_seed(evidence.seed * 1_000_003 + evidence.index)
    return torch.rand(evidence.view.width, generator=generator)
