"""Selectivity: how much more a neuron fires on the target than on the distractors."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion

EPSILON = 1e-6


@criterion("selectivity", needs=("target", "distractor"))
def selectivity(evidence: Evidence) -> torch.Tensor:
    """S = (mean over target prompts of a - mean over distractor prompts of a) / (std of a + 1e-6).

    a[p] is the mean over prompt p's tokens of abs h; std is the population's, over all prompts.

    Source:
        arXiv 2604.27115.
    """
    target, distractor = evidence.target, evidence.distractor
    both = target.merge(distractor)
    variance = both.prompt_square_sum / max(both.prompts, 1) - both.prompt_mean.square()
    deviation = variance.clamp_min(0).sqrt()
    return (target.prompt_mean - distractor.prompt_mean) / (deviation + EPSILON)
