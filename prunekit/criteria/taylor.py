"""LLM-Pruner: what the loss would change to first order if the neuron's weights were zero."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("taylor", gathers=("taylor",))
def taylor(evidence: Evidence) -> torch.Tensor:
    """Sum over the gate row, up row and down column of abs(w·∂loss/∂w), summed over prompts.

    LLM-Pruner takes the absolute value of the gradient of one batch of ten prompts; here every
    prompt is a batch, so that the score depends on no batch size.

    Source:
        LLM-Pruner, Ma et al., arXiv 2305.11627, element-wise first-order importance, summed over
        the group.
    """
    return evidence.target.taylor
