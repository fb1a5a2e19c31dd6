"""FLAP: what a neuron's fluctuation around its mean adds to the output, which no bias restores."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("fluctuation")
def fluctuation(evidence: Evidence) -> torch.Tensor:
    """Variance over target tokens of h, times the sum of squares of the neuron's down column.

    Source:
        FLAP's WIFV metric, An et al., arXiv 2312.11983; the population's variance.
    """
    target = evidence.target
    variance = target.rms.square() - target.token_mean.square()
    return variance.clamp_min(0) * evidence.view.down.double().square().sum(0).cpu()
