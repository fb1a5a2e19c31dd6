"""Minitron: mean absolute activation over tokens, then the norm over prompts."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("minitron")
def minitron(evidence: Evidence) -> torch.Tensor:
    """Root of the sum over target prompts of a², a the mean over the prompt's tokens of abs h.

    Source:
        Muralidharan et al., arXiv 2407.14679, with the aggregation (mean over the sequence, L2
        over the batch) that the paper and ModelOpt use; every prompt is a sample.
    """
    return evidence.target.prompt_square_sum.sqrt()
