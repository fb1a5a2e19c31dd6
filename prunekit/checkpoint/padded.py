"""Padded models: MLPs that differ in width, filled up with zeros to one, which loads anywhere."""

from __future__ import annotations

import copy

import torch
from torch import nn

from prunekit.arch import Slot, find_mlps
from prunekit.compact import replace_parameter, update_config


def pad(model: nn.Module) -> nn.Module:
    """A copy of a model all of whose MLPs are as wide as its widest: the same function, no faster.

    Neurons that are added have no weights in or out; the configuration says one width.

    Args:
        model: any that `find_mlps` knows.

    Cost:
        The model's bytes, and those of the zeros.
    """
    padded = copy.deepcopy(model)
    views = find_mlps(padded, verify=False)
    width = max(view.width for view in views)
    runs: dict[tuple[int, str], list[tuple[Slot, int]]] = {}
    for view in views:
        for slot in view.slots.values():
            runs.setdefault((id(slot.owner), slot.name), []).append((slot, view.width))
    for members in runs.values():
        # Experts lie in a stack, each with the same runs.
        same = [(slot, own) for slot, own in members if slot.expert == members[0][0].expert]
        replace_parameter(same[0][0], _padded(same, width))
    update_config(padded, views, [width] * len(views))
    padded.prunekit = {**(getattr(model, "prunekit", None) or {}), "padded": width}
    return padded


def _padded(members: list[tuple[Slot, int]], width: int) -> torch.Tensor:
    slot = members[0][0]
    old = slot.parameter.detach()
    axis = slot.axis + (slot.expert is not None)
    nothing = old.shape[axis]  # where a neuron of zeros will stand
    index = []
    for run, own in members:
        index += [torch.arange(run.start, run.start + own), torch.full((width - own,), nothing)]
    zero = old.new_zeros([1 if i == axis else n for i, n in enumerate(old.shape)])
    return torch.cat([old, zero], axis).index_select(axis, torch.cat(index).to(old.device))
