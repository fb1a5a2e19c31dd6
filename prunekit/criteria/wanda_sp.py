"""Wanda-sp: Wanda's weight scores, averaged over a neuron's down column."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("wanda_sp")
def wanda_sp(evidence: Evidence) -> torch.Tensor:
    """Mean over outputs j of abs down[j, i], times the norm of h_i over all target tokens.

    Source:
        FLAP's repository (An et al., arXiv 2312.11983), there the structured extension of Wanda,
        Sun et al., arXiv 2306.11695.
    """
    size = evidence.view.down.double().abs().mean(dim=0).cpu()
    return size * evidence.target.token_square_sum.sqrt()
