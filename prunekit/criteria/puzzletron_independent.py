"""Puzzletron's independent channel contribution: mean absolute activation times the down column."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("puzzletron_independent")
def puzzletron_independent(evidence: Evidence) -> torch.Tensor:
    """Norm of the neuron's down column, times the sum over target prompts of mean abs h.

    Source:
        Puzzle, Bercovich et al., arXiv 2411.19146, as ModelOpt computes it; every prompt is a
        sample.
    """
    return evidence.view.down.double().norm(dim=0).cpu() * evidence.target.prompt_sum
