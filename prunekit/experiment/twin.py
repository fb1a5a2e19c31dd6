"""Copies of a model for `prune` that cost no more than what it removes."""

from __future__ import annotations

import copy

from torch import nn


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares every matrix with the model.

    `prune` replaces the matrices of the MLPs and overwrites none, unless it distills; the biases,
    which repairs do overwrite, are the copy's.
    """
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if p.dim() > 1})
