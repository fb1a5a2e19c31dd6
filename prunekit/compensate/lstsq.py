"""Repair by least squares, each MLP for itself, from the Gram matrices of a calibration."""

from __future__ import annotations

import logging

import torch

from prunekit.arch import MLPView
from prunekit.compensate.base import Repair, dense_down, removed_mask
from prunekit.errors import InputError
from prunekit.stats import NeuronSums

logger = logging.getLogger(__name__)

RIDGE = 1e-3  # times the mean of the Gram matrix's diagonal
TOKENS_A_NEURON = 8  # that suffice for this ridge


def lstsq(view: MLPView, sums: NeuronSums, kept: torch.Tensor) -> Repair | None:
    """Least squares on the kept neurons: the change D that minimises the error of the output.

    With C = HᵀH, kept S and removed R: W' = W[:,S] + W[:,R]·C[R,S]·(C[S,S] + λI)⁻¹, which is
    argmin ‖H·Wᵀ - H[:,S]·W'ᵀ‖² + λ‖W' - W[:,S]‖². Where the model has a bias, C is centred and the
    bias takes the difference of the means. λ grows where there are fewer than 8 tokens a neuron.

    Cost:
        F'³/3 + 2·D·F'² FLOP in fp64, 8·F² bytes.
    """
    if sums.held("gram") is None:
        raise InputError("compensate lstsq: needs the Gram matrix; calibrate with --gram")
    down, bias = dense_down(view)
    gram = sums.second_moment(centred=bias is not None)
    removed = removed_mask(view.width, kept)
    inner = gram[kept[:, None], kept]
    # With few tokens for so many neurons C says little of how others will correlate.
    scarce = max(1.0, TOKENS_A_NEURON * inner.shape[0] / sums.tokens)
    ridge = RIDGE * scarce**3 * inner.diagonal().mean()
    if not ridge > 0:
        return None
    inner.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        logger.warning("%s: its Gram matrix is not positive definite; left unrepaired", view.name)
        return None
    cross = down[:, removed] @ gram[removed.nonzero(), kept]
    repaired = down[:, kept] + torch.cholesky_solve(cross.T, factor).T
    if bias is None:
        return Repair(repaired)
    return Repair(repaired, bias + down @ sums.token_mean - repaired @ sums.token_mean[kept])
