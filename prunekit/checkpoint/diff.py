"""How two plans or models differ: in the neurons they keep, in their recipes, in their weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.card import corpora
from prunekit.checkpoint.sides import Side, Weights, mlps
from prunekit.compact import gathered
from prunekit.errors import InputError

_BLOCK = 1 << 22  # elements that are compared at a time


@dataclass(frozen=True)
class Overlap:
    """How many neurons of an MLP, or of all, two sides keep."""

    both: int
    only_a: int
    only_b: int

    @property
    def jaccard(self) -> float:
        """Those that both keep, of those that either does."""
        return self.both / max(self.both + self.only_a + self.only_b, 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"jaccard": self.jaccard}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs.

    Attributes:
        name: as the model names it.
        shape: of what was compared: of an MLP's matrix, the neurons that both keep.
        relative: ‖B - A‖ / ‖A‖, Frobenius; None where A is zero.
        largest: max |B - A|.
    """

    name: str
    shape: tuple[int, ...]
    relative: float | None
    largest: float


@dataclass(frozen=True)
class TensorDifferences:
    """What became of all tensors.

    Attributes:
        compared: how many both have, in one shape.
        differing: those of them whose values differ, the most first.
        only_a, only_b: names that the other lacks.
        reshaped: names of those that no choice of neurons brings to one shape.
    """

    compared: int
    differing: list[TensorDifference]
    only_a: list[str]
    only_b: list[str]
    reshaped: list[str]


def check_one_origin(a: Side, b: Side) -> None:
    """Raise InputError unless both keep neurons of the same dense model, as far as can be told."""
    if a.dense_widths != b.dense_widths:
        what = " and ".join(mlps(side.dense_widths) for side in (a, b))
    elif a.fingerprint and b.fingerprint and a.fingerprint != b.fingerprint:
        what = "their MLPs' names, activations or hidden sizes differ"
    elif all(side.record.get("model") for side in (a, b)) and not _names(a) & _names(b):
        what = f"{a.record['model']} and {b.record['model']}"
    else:
        return
    raise InputError(
        f"{a.path} and {b.path}: expected plans or models of one dense model, got those of two: "
        f"{what}"
    )


def _names(side: Side) -> set[str]:
    """What a model is called, and what it was made from, without the folders around it."""
    return {Path(os.path.abspath(name)).name for name in (side.path, side.record["model"])}


def overlaps(a: Side, b: Side) -> list[Overlap] | None:
    """The neurons that both keep, and that one does, an MLP each; None where it is not known."""
    if a.kept is None or b.kept is None:
        return None
    found = []
    for one, other in zip(a.kept, b.kept, strict=True):
        both = int(torch.isin(one, other, assume_unique=True).sum())
        found.append(Overlap(both, one.numel() - both, other.numel() - both))
    return found


def total(parts: list[Overlap]) -> Overlap:
    """All MLPs together."""
    return Overlap(*(sum(getattr(p, key) for p in parts) for key in ("both", "only_a", "only_b")))


def recipe_differences(a: Side, b: Side) -> dict[str, tuple[Any, Any]]:
    """What was recorded differently of how neurons were chosen and repaired; None: not recorded."""
    sides = []
    for side in (a, b):
        facts = {k: v for k, v in side.recipe.items() if k != "fingerprint"}
        seen = corpora(side.record.get("calibration") or {})
        facts["corpora"] = [(c["class"], c["name"], c["hash"]) for c in seen] or None
        facts["padded"] = side.record.get("padded")
        if recovery := side.record.get("recovery"):
            facts["recovery"] = f"{recovery['settings']['method']}, {recovery['steps']} steps"
        sides.append(facts)
    one, other = sides
    return {
        key: (one.get(key), other.get(key))
        for key in {**one, **other}
        if one.get(key) != other.get(key)
    }


def obstacle(a: Side, b: Side) -> str:
    """Why the weights of two sides cannot be compared, or ""."""
    for side in (a, b):
        if side.kind == "plan":
            return "a plan has none"
        if side.weights is None:
            return f"{side.path} has no safetensors"
    if a.kept is None or b.kept is None:
        return "nothing says which neurons are kept"
    if not _alike(a, b) and not (a.weights.alignable and b.weights.alignable):
        return "the experts' neurons cannot be found in them"
    return ""


def _alike(a: Side, b: Side) -> bool:
    same = all(torch.equal(one, other) for one, other in zip(a.kept, b.kept, strict=True))
    return same and a.weights.widths == b.weights.widths


def diff_tensors(
    a: Side, b: Side, advance: Callable[[int], object] = lambda size: None
) -> TensorDifferences:
    """Compare two models' weights, a tensor of each in memory at a time.

    Of an MLP's parameters the neurons are compared that both keep.

    Args:
        a, b: models of one dense model (`check_one_origin`) without an `obstacle`.
        advance: told the bytes that were read.

    Raises:
        InputError: a tensor holds NaN or Inf, or a file became shorter.

    Cost:
        Both models' bytes read once; the largest tensor of each, and its kept neurons.
    """
    mine, theirs = a.weights, b.weights
    ways = (None, None) if _alike(a, b) else _ways(a, b)
    compared, differing, reshaped = 0, [], []
    for name in mine.tensors:
        if name not in theirs.tensors:
            continue
        one, other = (
            _common(weights, name, way) for weights, way in zip((mine, theirs), ways, strict=True)
        )
        advance(mine.tensors[name].size + theirs.tensors[name].size)
        if one.shape != other.shape:
            reshaped.append(name)
            continue
        compared += 1
        found = _difference(name, one, other)
        if found is not None:
            differing.append(found)
    differing.sort(key=lambda d: math.inf if d.relative is None else d.relative, reverse=True)
    only_a = sorted(mine.tensors.keys() - theirs.tensors.keys())
    only_b = sorted(theirs.tensors.keys() - mine.tensors.keys())
    return TensorDifferences(compared, differing, only_a, only_b, reshaped)


def _ways(a: Side, b: Side) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each MLP of either where the neurons that both keep stand among its own, int64."""
    pairs = list(zip(a.kept, b.kept, strict=True))
    return (
        [torch.isin(one, other).nonzero()[:, 0] for one, other in pairs],
        [torch.isin(other, one).nonzero()[:, 0] for one, other in pairs],
    )


def _common(weights: Weights, name: str, way: list[torch.Tensor] | None) -> torch.Tensor:
    tensor = weights.tensors[name].read()
    members = weights.members.get(name)
    if way is None or members is None:
        return tensor
    if all(way[i].numel() == weights.widths[i] for _, i in members):
        return tensor
    return gathered(tensor, [(slot, way[i]) for slot, i in members])


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    yield from (flat[i : i + _BLOCK].double() for i in range(0, flat.numel(), _BLOCK))


def _difference(name: str, a: torch.Tensor, b: torch.Tensor) -> TensorDifference | None:
    """None where all values are the same."""
    if a.dtype == b.dtype and torch.equal(a, b):
        return None
    squares = norm = largest = 0.0
    for one, other in zip(_blocks(a), _blocks(b), strict=True):
        gap = other - one
        squares += gap.square().sum().item()
        norm += one.square().sum().item()
        largest = max(largest, gap.abs().max().item())
    if not math.isfinite(squares + norm):
        raise InputError(f"{name}: holds NaN or Inf in one of the models; get it anew")
    if not largest:
        return None
    relative = math.sqrt(squares / norm) if norm else None
    return TensorDifference(name, tuple(a.shape), relative, largest)
