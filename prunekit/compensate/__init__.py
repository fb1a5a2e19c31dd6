"""Repairs of what pruning broke, without labels, from calibration; strongest last in METHODS."""

from __future__ import annotations

import torch

from prunekit.arch import MLPView
from prunekit.compensate.base import Heard, Repair, check_prompts, check_statistics
from prunekit.compensate.bias import bias
from prunekit.compensate.distill import MINUTES, check_budget, distill
from prunekit.compensate.lstsq import RIDGE, lstsq
from prunekit.compensate.rehearse import rehearse
from prunekit.compensate.sequential import sequential
from prunekit.compensate.teacher import Teacher
from prunekit.errors import InputError
from prunekit.stats import NeuronStats, NeuronSums

__all__ = [
    "METHODS",
    "MINUTES",
    "RIDGE",
    "Heard",
    "Repair",
    "Teacher",
    "check_budget",
    "check_method",
    "check_prompts",
    "check_statistics",
    "default_method",
    "distill",
    "rehearse",
    "repair",
    "sequential",
]

METHODS = ("none", "bias", "lstsq", "sequential", "distill")


def check_method(method: str) -> None:
    """Raise InputError unless the name is one of ``METHODS``."""
    if method not in METHODS:
        raise InputError(f"compensate: got {method!r}; expected one of {', '.join(METHODS)}")


def default_method(stats: NeuronStats | None) -> str:
    """The best repair that trains nothing and that the statistics suffice for."""
    if stats is None or stats.target[0].held("gram") is None:
        return "none"
    return "lstsq" if stats.prompts is None else "sequential"


def repair(view: MLPView, sums: NeuronSums, kept: torch.Tensor, method: str) -> Repair | None:
    """Repair one MLP's down projection from its statistics, for the neurons that stay.

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
    return bias(view, sums, kept) if method == "bias" else lstsq(view, sums, kept)
