"""Allocation: how many neurons each MLP keeps, from what it costs the model to keep fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit import files
from prunekit.arch import blocks, find_mlps, fingerprint
from prunekit.errors import InputError

_KIND = "sensitivity"
_POINTS = 64  # of a curve
LEAST, MOST = 0.5, 1.5  # of the share that uniform keeps: errors compound, so no layer pays for all
OUTLIER = 2.0  # times the median of all curves: none is believed to be dearer
BELIEF = 0.5  # exponent of a curve over that median: curves say too much about how layers differ


@dataclass(frozen=True)
class Sensitivity:
    """What the model loses by the width of its MLPs, in one unit for all of them.

    Attributes:
        groups: positions of the MLPs that keep equally many neurons: one each, but the experts of
            a layer together.
        dense_widths: F of each MLP.
        widths: for each group the widths of its curve, ascending up to F.
        losses: for each group what the model loses at them.
        recipe: where it comes from.
    """

    groups: tuple[tuple[int, ...], ...]
    dense_widths: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    recipe: dict[str, Any] = field(default_factory=dict)

    def at(self, group: int, widths: Sequence[int]) -> np.ndarray:
        """A group's losses at some widths, its curve made falling and convex: its lower hull.

        What speaks against that is noise: more neurons never cost, and the first to go are those
        that cost least.
        """
        falling = np.minimum.accumulate(np.array(self.losses[group], dtype=float))
        return np.interp(widths, *_lower_hull(np.array(self.widths[group], dtype=float), falling))

    def save(self, path: str | Path) -> None:
        """Write safetensors with the recipe in its header."""
        tensors = {}
        for i, (widths, losses) in enumerate(zip(self.widths, self.losses, strict=True)):
            tensors[f"widths.{i}"] = torch.tensor(widths, dtype=torch.int32)
            tensors[f"losses.{i}"] = torch.tensor(losses, dtype=torch.float64)
        header = {
            "groups": [list(group) for group in self.groups],
            "dense_widths": list(self.dense_widths),
            "recipe": self.recipe,
        }
        files.write_tensors(path, tensors, _KIND, header)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            InputError: missing, cut short, of another kind, or its parts do not fit together.
        """
        tensors, header = files.read_tensors(path, _KIND)
        try:
            groups = tuple(tuple(group) for group in header["groups"])
            widths = tuple(tuple(tensors[f"widths.{i}"].tolist()) for i in range(len(groups)))
            losses = tuple(tuple(tensors[f"losses.{i}"].tolist()) for i in range(len(groups)))
            found = cls(groups, tuple(header["dense_widths"]), widths, losses, header["recipe"])
        except KeyError as error:
            raise InputError(f"{path}: its header and tensors do not fit together") from error
        found.check()
        return found

    def check(self) -> None:
        """Raise InputError unless every MLP is in one group, with a finite curve."""
        if sorted(i for group in self.groups for i in group) != list(range(len(self.dense_widths))):
            raise InputError("sensitivity: its groups must hold each MLP once")
        for i, (widths, losses) in enumerate(zip(self.widths, self.losses, strict=True)):
            ascending = widths and all(a < b for a, b in pairwise(widths))
            if not ascending or len(widths) != len(losses) or not np.isfinite(losses).all():
                raise InputError(
                    f"sensitivity: group {i}: expected ascending widths with finite losses; "
                    "make it anew from the scores"
                )


def sensitivity(scores: Sequence[torch.Tensor], model: nn.Module) -> Sensitivity:
    """How much the loss rises by the width of each MLP: what `plan` needs for budget allocation.

    Args:
        scores: of the criterion reconstruction_fisher: what removing a neuron, and all of the MLP
            that go before it, costs to second order once repaired. In nats, so MLPs compare.
        model: the dense model that was scored.

    Returns:
        A curve of at most 64 widths for each MLP, and one for all the experts of a layer together,
        drawn half way (geometrically) towards the median of all curves as fractions of F:
        measured, whole curves say too much about how layers differ (the criterion takes a token's
        activation and its gradient as independent, which may be why). Where one token in a hundred
        has enormous activations and no gradient they say far too much, so that none counts as
        dearer than twice the median.

    Raises:
        InputError: the scores do not fit the model, or are not finite.
    """
    views = find_mlps(model, verify=False)
    dense = tuple(view.width for view in views)
    if tuple(s.numel() for s in scores) != dense or not all(s.isfinite().all() for s in scores):
        raise InputError(
            "sensitivity: expected one finite score a neuron of this model; score this model"
        )
    groups = tuple(tuple(block) for block in blocks(views))
    curves = np.stack([sum(_curve(scores[i]) for i in group) for group in groups])
    median = np.median(curves, axis=0)
    curves = median ** (1 - BELIEF) * np.minimum(curves, OUTLIER * median) ** BELIEF
    grids, losses = [], []
    for group, curve in zip(groups, curves, strict=True):
        widths, first = np.unique(_grid(dense[group[0]]), return_index=True)
        grids.append(tuple(widths.tolist()))
        losses.append(tuple(curve[first].tolist()))
    recipe = {"criterion": "reconstruction_fisher", "fingerprint": fingerprint(views)}
    return Sensitivity(groups, dense, tuple(grids), tuple(losses), recipe)


def _grid(dense: int) -> np.ndarray:
    """[_POINTS], the widths of a curve, F the last; a narrow MLP has some twice."""
    return np.maximum(np.round(dense * np.arange(1, _POINTS + 1) / _POINTS), 1).astype(int)


def _curve(scores: torch.Tensor) -> np.ndarray:
    """[_POINTS]: at each width of the grid the score of the last neuron that had to go."""
    cumulative = np.concatenate([[0.0], scores.double().sort().values.numpy()])
    return cumulative[scores.numel() - _grid(scores.numel())]


def _lower_hull(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return x[kept], y[kept]


def budget_widths(
    sensitivity: Sensitivity, uniform: Sequence[int], multiple_of: int = 64
) -> list[int]:
    """The widths that lose least among those that keep as many neurons as ``uniform`` does.

    The losses of the groups add up, each read off its `Sensitivity.curve`. No group keeps less than
    half or more than one and a half times its uniform share, nor less than its curve covers.

    Args:
        sensitivity: of the model.
        uniform: for each MLP what uniform allocation keeps.
        multiple_of: widths are multiples of it, or the dense or the uniform width.

    Returns:
        F' of each MLP; their sum is that of ``uniform``.

    Raises:
        InputError: the sensitivity is of another model.

    Cost:
        G·T·C for G groups, T neurons to give in units of the rounding, C choices a group.
    """
    if len(uniform) != len(sensitivity.dense_widths):
        raise InputError(
            f"sensitivity: measured on {len(sensitivity.dense_widths)} MLPs, but the plan has "
            f"{len(uniform)}; measure it on this model"
        )
    choices, costs = [], []
    for g, group in enumerate(sensitivity.groups):
        dense, even = sensitivity.dense_widths[group[0]], uniform[group[0]]
        low, high = max(LEAST * even, sensitivity.widths[g][0]), MOST * even
        rounded = {*range(multiple_of, dense, multiple_of), dense}
        choices.append(sorted({w for w in rounded if low <= w <= high} | {even}))
        costs.append(sensitivity.at(g, choices[-1]))
    sizes = [len(group) for group in sensitivity.groups]
    chosen = cheapest(choices, costs, sizes, sum(uniform))
    widths = [0] * len(uniform)
    for group, width in zip(sensitivity.groups, chosen, strict=True):
        for i in group:
            widths[i] = width
    return widths


def cheapest(
    choices: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]],
    sizes: Sequence[int],
    total: int,
) -> list[int]:
    """Pick one width a group so that Σ size·width = total at the least Σ cost: exactly, by dynamic
    programming over the groups. The total must be reachable; of equal sums any may win.
    """
    unit = reduce(gcd, (s * w for s, ws in zip(sizes, choices, strict=True) for w in ws), total)
    best = np.full(total // unit + 1, np.inf)
    best[0] = 0.0
    picked = []
    for size, widths, prices in zip(sizes, choices, costs, strict=True):
        reached, pick = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.int32)
        for k, (width, price) in enumerate(zip(widths, prices, strict=True)):
            step = size * width // unit
            if step >= len(best):
                continue
            candidate = best[: len(best) - step] + price
            better = candidate < reached[step:]
            reached[step:][better] = candidate[better]
            pick[step:][better] = k
        picked.append(pick)
        best = reached
    if not np.isfinite(best[-1]):
        raise InputError(f"allocation: no choice of widths keeps {total} neurons")
    left, found = len(best) - 1, []
    for size, widths, pick in reversed(list(zip(sizes, choices, picked, strict=True))):
        width = widths[pick[left]]
        found.append(width)
        left -= size * width // unit
    return found[::-1]
