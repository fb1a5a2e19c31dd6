"""Copies of a model for `prune` that cost no more than what it removes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from prunekit.arch import find_mlps
from prunekit.errors import InputError
from prunekit.plan import PrunePlan, plan


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares every matrix with the model.

    `prune` replaces the matrices of the MLPs and overwrites none, unless it distills; the biases,
    which repairs do overwrite, are the copy's.
    """
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if p.dim() > 1})


def plan_of_widths(model: nn.Module, sparsity: float, multiple_of: int) -> PrunePlan:
    """A plan that keeps the first neurons, for what depends on the widths alone: speed, memory."""
    zeros = [torch.zeros(view.width) for view in find_mlps(model, verify=False)]
    return plan(zeros, sparsity, multiple_of=multiple_of)


def plan_of_neurons(model: nn.Module, count: int) -> PrunePlan:
    """As `plan_of_widths`, with so many neurons left in every MLP.

    Raises:
        InputError: there are no so many.
    """
    dense = tuple(view.width for view in find_mlps(model, verify=False))
    if not 0 < count <= min(dense):
        raise InputError(f"--neurons: got {count}; expected 1 to {min(dense)}")
    return PrunePlan(tuple(torch.arange(count, dtype=torch.int32) for _ in dense), dense)
