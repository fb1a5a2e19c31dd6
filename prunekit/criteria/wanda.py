"""Wanda, structured: the size of what a neuron adds to the residual stream."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("wanda")
def wanda(evidence: Evidence) -> torch.Tensor:
    """Root mean square over target tokens of h, times the norm of the neuron's down column.

    Source:
        Sun et al., arXiv 2306.11695, taken for whole neurons.
    """
    return evidence.target.rms * evidence.view.down.double().norm(dim=0).cpu()
