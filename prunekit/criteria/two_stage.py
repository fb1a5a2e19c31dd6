"""2SSP's first stage: the mean over prompts of the norm of a neuron's activations."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("two_stage", gathers=("prompt_norm_sum",))
def two_stage(evidence: Evidence) -> torch.Tensor:
    """Mean over target prompts of the L2 norm of h over the prompt's tokens.

    Source:
        2SSP, Sandri et al., arXiv 2501.17771, the first stage (width pruning).
    """
    return evidence.target.prompt_norm_sum / max(evidence.target.prompts, 1)
