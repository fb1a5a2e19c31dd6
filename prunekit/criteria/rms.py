"""Root mean square activation: how much energy a neuron has on the target."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("rms")
def rms(evidence: Evidence) -> torch.Tensor:
    """Root mean square over target tokens of h: `wanda` without the weights."""
    return evidence.target.rms
