"""Closed-form repair of the down projection, without labels, from calibration's statistics."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from prunekit.arch import MLPView
from prunekit.errors import InputError
from prunekit.stats import NeuronStats, NeuronSums

logger = logging.getLogger(__name__)

METHODS = ("none", "bias", "lstsq")
RIDGE = 1e-3  # times the mean of the Gram matrix's diagonal


@dataclass(frozen=True)
class Repair:
    """What replaces a down projection: weight [D, F'] and bias [D] (None: as it was), fp64."""

    down: torch.Tensor
    bias: torch.Tensor | None = None


def check_method(method: str) -> None:
    """Raise InputError unless the name is one of ``METHODS``."""
    if method not in METHODS:
        raise InputError(f"compensate: got {method!r}; expected one of {', '.join(METHODS)}")


def default_method(stats: NeuronStats | None) -> str:
    """lstsq where the statistics have Gram matrices for it, else none."""
    return "lstsq" if stats is not None and stats.target[0].gram is not None else "none"


def repair(view: MLPView, sums: NeuronSums, kept: torch.Tensor, method: str) -> Repair | None:
    """Repair one MLP's down projection for the neurons that stay.

    Args:
        view: the dense MLP.
        sums: its statistics on the target; lstsq needs their Gram matrix.
        kept: [F'], the neurons that stay.
        method: none, bias or lstsq.

    Returns:
        The repair, or None where there is nothing to do (none, or no token ever came).

    Raises:
        InputError: unknown method, or lstsq without a Gram matrix.
    """
    check_method(method)
    if method == "none" or sums.tokens == 0:
        return None
    kept = kept.long()
    return _bias(view, sums, kept) if method == "bias" else _lstsq(view, sums, kept)


def _dense(view: MLPView) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = view.down_bias
    return view.down.detach().double().cpu(), None if bias is None else bias.detach().double().cpu()


def _bias(view: MLPView, sums: NeuronSums, kept: torch.Tensor) -> Repair:
    """Add what the removed neurons gave on average: b + W·mean(h) over the removed.

    Source:
        FLAP, An et al., arXiv 2312.11983, equation 5.
    """
    down, bias = _dense(view)
    removed = torch.ones(view.width, dtype=torch.bool)
    removed[kept] = False
    offset = down[:, removed] @ sums.token_mean[removed]
    return Repair(down[:, kept], offset if bias is None else bias + offset)


def _lstsq(view: MLPView, sums: NeuronSums, kept: torch.Tensor) -> Repair | None:
    """Least squares on the kept neurons: the change D that minimises the error of the output.

    With C = HᵀH, kept S and removed R: W' = W[:,S] + W[:,R]·C[R,S]·(C[S,S] + λI)⁻¹, which is
    argmin ‖H·Wᵀ - H[:,S]·W'ᵀ‖² + λ‖W' - W[:,S]‖². Where the model has a bias, C is centred and the
    bias takes the difference of the means.

    Cost:
        F'³/3 + 2·D·F'² FLOP in fp64, 8·F² bytes.
    """
    if sums.gram is None:
        raise InputError("compensate lstsq: needs the Gram matrix; calibrate with --gram")
    down, bias = _dense(view)
    gram = sums.gram.double() / sums.tokens
    if bias is not None:
        gram -= torch.outer(sums.token_mean, sums.token_mean)
    removed = torch.ones(view.width, dtype=torch.bool)
    removed[kept] = False
    inner = gram[kept][:, kept]
    ridge = RIDGE * inner.diagonal().mean()
    if not ridge > 0:
        return None
    inner.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        logger.warning("%s: its Gram matrix is not positive definite; left unrepaired", view.name)
        return None
    cross = down[:, removed] @ gram[removed][:, kept]
    repaired = down[:, kept] + torch.cholesky_solve(cross.T, factor).T
    if bias is None:
        return Repair(repaired)
    return Repair(repaired, bias + down @ sums.token_mean - repaired @ sums.token_mean[kept])
