"""Scores become a plan: which neurons each MLP keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunekit import files
from prunekit.allocation import Sensitivity, budget_widths
from prunekit.arch import MLPView, fingerprint
from prunekit.errors import InputError
from prunekit.values import conform

_KIND = "prune-plan"
STRATEGIES = ("selective", "reverse", "random")
ALLOCATIONS = ("uniform", "budget")


@dataclass(frozen=True)
class PrunePlan:
    """Which neurons stay: the only thing that pruning needs besides the weights.

    Attributes:
        kept: for each MLP the kept neurons, int32, ascending.
        dense_widths: F of each MLP before pruning.
        recipe: the sparsity asked for, strategy, allocation, rounding, seed, and what the caller
            added (criterion, hash of the statistics).
    """

    kept: tuple[torch.Tensor, ...]
    dense_widths: tuple[int, ...]
    recipe: dict[str, Any] = field(default_factory=dict)

    def widths(self) -> list[int]:
        """F' of each MLP after pruning."""
        return [k.numel() for k in self.kept]

    @property
    def sparsity(self) -> float:
        """The fraction of neurons the plan really removes."""
        return 1 - sum(self.widths()) / sum(self.dense_widths)

    def check_model(self, views: list[MLPView]) -> None:
        """Raise InputError unless the plan was made for a model with these MLPs."""
        widths = tuple(view.width for view in views)
        made_for = self.recipe.get("fingerprint", "")
        if widths != self.dense_widths or (made_for and made_for != fingerprint(views)):
            raise InputError(
                f"plan: made for another model ({len(self.kept)} MLPs of {self.dense_widths[0]} "
                f"neurons) than this one ({len(views)} of {views[0].width})"
            )

    def save(self, path: str | Path) -> None:
        """Write safetensors with the recipe in its header."""
        tensors = {f"kept.{i}": k for i, k in enumerate(self.kept)}
        header = {"dense_widths": list(self.dense_widths), "recipe": self.recipe}
        files.write_tensors(path, tensors, _KIND, header)

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read what `save` wrote.

        Raises:
            InputError: missing, cut short, of another kind, or with indices that are out of range
                or not ascending.
        """
        tensors, header = files.read_tensors(path, _KIND)
        try:
            conform(header, {"dense_widths": [int], "recipe": dict}, "header")
            widths = tuple(header["dense_widths"])
            kept = tuple(tensors[f"kept.{i}"] for i in range(len(widths)))
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: its header and tensors do not fit together") from error
        if not widths:
            raise InputError(f"{path}: is a plan of no MLP")
        for i, (k, width) in enumerate(zip(kept, widths, strict=True)):
            plain = k.dtype == torch.int32 and k.dim() == 1 and k.numel() > 0
            ascending = plain and bool((k[1:] > k[:-1]).all())
            if not ascending or int(k[0]) < 0 or int(k[-1]) >= width:
                raise InputError(f"{path}: MLP {i}: kept neurons must ascend within [0, {width})")
        return cls(kept, widths, header["recipe"])


def kept_width(width: int, sparsity: float, multiple_of: int) -> int:
    """The multiple of ``multiple_of`` nearest to width·(1 - sparsity), ties upward.

    At least one multiple, at most ``width`` (which itself need be no multiple).
    """
    target = width * (1 - sparsity)
    nearest = math.floor(target / multiple_of + 0.5) * multiple_of
    return min(max(nearest, multiple_of), width)


def check_sparsity(sparsity: float) -> None:
    """Raise InputError unless 0 < sparsity < 1."""
    if not 0 < sparsity < 1:
        raise InputError(f"sparsity: got {sparsity}; expected a fraction with 0 < sparsity < 1")


def plan(
    scores: Sequence[torch.Tensor],
    sparsity: float,
    *,
    strategy: str = "selective",
    allocation: str = "uniform",
    sensitivity: Sensitivity | None = None,
    multiple_of: int = 64,
    seed: int = 0,
    recipe: dict[str, Any] | None = None,
) -> PrunePlan:
    """Choose which neurons to keep; equal scores keep the lower index.

    Args:
        scores: one [F] tensor an MLP; for ``random`` only the lengths count.
        sparsity: the fraction of neurons to remove, 0 < sparsity < 1.
        strategy: selective removes the lowest scores, reverse the highest, random by seed.
        allocation: uniform gives every MLP the same share; budget shares out as many neurons in
            all so that the losses of ``sensitivity`` are least (`prunekit.choose.planned` asks a
            rehearsal whether that is worth more).
        sensitivity: of the model, from `prunekit.sensitivity`; for budget.
        multiple_of: kept widths are rounded to it.
        seed: for random.
        recipe: further facts to record.

    Raises:
        InputError: an option is out of range, or scores are not finite.
    """
    check_sparsity(sparsity)
    if strategy not in STRATEGIES:
        raise InputError(f"strategy: got {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if allocation not in ALLOCATIONS:
        raise InputError(
            f"allocation: got {allocation!r}; expected one of {', '.join(ALLOCATIONS)}"
        )
    if multiple_of < 1:
        raise InputError(f"multiple_of: got {multiple_of}; expected at least 1")
    for i, values in enumerate(scores):
        if not torch.isfinite(values).all():
            raise InputError(f"scores: those of MLP {i} are not all finite")
    widths = [kept_width(values.numel(), sparsity, multiple_of) for values in scores]
    if allocation == "budget":
        if sensitivity is None:
            raise InputError(
                "allocation budget: needs a sensitivity; pass prunekit.sensitivity(scores, model)"
            )
        widths = budget_widths(sensitivity, widths, multiple_of)
    kept = [
        _keep(values, width, strategy, seed, i)
        for i, (values, width) in enumerate(zip(scores, widths, strict=True))
    ]
    facts = {
        "sparsity": sparsity,
        "strategy": strategy,
        "allocation": allocation,
        "multiple_of": multiple_of,
        "seed": seed,
        **(recipe or {}),
    }
    return PrunePlan(tuple(kept), tuple(v.numel() for v in scores), facts)


def _keep(values: torch.Tensor, count: int, strategy: str, seed: int, mlp: int) -> torch.Tensor:
    if strategy == "random":
        generator = torch.Generator().manual_seed(seed * 1_000_003 + mlp)
        order = torch.randperm(values.numel(), generator=generator)
    else:
        order = torch.argsort(values, descending=strategy == "selective", stable=True)
    return order[:count].sort().values.to(torch.int32)
