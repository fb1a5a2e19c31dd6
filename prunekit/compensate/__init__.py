"""Repairs of what pruning broke, without labels, from calibration; strongest last in METHODS."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prunekit.arch import MLPView
from prunekit.compensate.base import Repair
from prunekit.compensate.bias import bias
from prunekit.compensate.lstsq import RIDGE, lstsq
from prunekit.compensate.sequential import sequential
from prunekit.errors import InputError
from prunekit.stats import NeuronStats, NeuronSums

__all__ = [
    "METHODS",
    "RIDGE",
    "Repair",
    "check_method",
    "check_prompts",
    "default_method",
    "needs_prompts",
    "repair",
    "sequential",
]

METHODS = ("none", "bias", "lstsq", "sequential")


def check_method(method: str) -> None:
    """Raise InputError unless the name is one of ``METHODS``."""
    if method not in METHODS:
        raise InputError(f"compensate: got {method!r}; expected one of {', '.join(METHODS)}")


def needs_prompts(method: str) -> bool:
    """Whether a method runs the model over the calibration's prompts again."""
    return method == "sequential"


def check_prompts(views: Sequence[MLPView], stats: NeuronStats, method: str) -> None:
    """Raise InputError unless the statistics hold prompts, and the weights lie in memory."""
    if stats.prompts is None:
        raise InputError(
            f"compensate {method}: the statistics hold no prompts; calibrate with --gram"
        )
    for view in views:
        if view.gate.is_meta or not view.gate.is_floating_point():
            raise InputError(
                f"compensate {method}: {view.name} is offloaded or quantised ({view.gate.dtype}); "
                "use lstsq"
            )


def default_method(stats: NeuronStats | None) -> str:
    """The best repair that trains nothing and that the statistics suffice for."""
    if stats is None or stats.target[0].gram is None:
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
