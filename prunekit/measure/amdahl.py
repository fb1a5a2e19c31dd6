"""What pruning can give at most, how much of it was reached, and what holds it back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from prunekit.arch import find_mlps
from prunekit.measure.parts import Parts

REACHED = 0.9  # of the bound: from here on nothing is said to hold a model back
_NAMES = {
    "mlp": "the MLPs",
    "attention": "attention",
    "head": "the output head",
    "rest": "norms, embedding and framework",
}
_ALL_BUT_MLPS = "everything but the MLPs"
_ALIGNED = 32  # neurons; bf16 rows of a multiple begin on cache lines


@dataclass(frozen=True)
class Bound:
    """A speed-up over a dense model, as far as removing neurons can bring it.

    Attributes:
        speedup: by Amdahl's law: the dense MLPs' time shrinks with their weights, and nothing else.
        reached: the share of it that was measured.
        why: a sentence: what the bound comes from, and what holds the model back.
    """

    speedup: float
    reached: float
    why: str


def mlp_weights(model: nn.Module) -> int:
    """Numbers in the MLPs' projections, biases left out."""
    views = find_mlps(model, verify=False)
    return sum(
        slot.read(view.width).numel()
        for view in views
        for role, slot in view.slots.items()
        if "bias" not in role
    )


def _unaligned(model: nn.Module) -> int | None:
    """A width that is no multiple of 32, or None."""
    widths = (view.width for view in find_mlps(model, verify=False))
    return next((width for width in widths if width % _ALIGNED), None)


def bound(dense: Parts, pruned: Parts, kept: float) -> tuple[float, str]:
    """Return the largest speed-up that a profile allows, and the part that falls short most.

    Args:
        dense, pruned: the seconds that the two models' runs took by part.
        kept: the share of the dense MLPs' weights that is left.
    """
    allowed = dense.total / (dense.total - dense.mlp * (1 - kept))
    excess = {
        "mlp": pruned.mlp - dense.mlp * kept,
        "attention": pruned.attention - dense.attention,
        "head": pruned.head - dense.head,
        "rest": pruned.rest - dense.rest,
    }
    return allowed, max(excess, key=excess.__getitem__)


def explain(
    dense: Parts, pruned: Parts, kept: float, measured: float, unaligned: int | None
) -> Bound:
    """Put a measured speed-up beside its bound, in words.

    Args:
        dense, pruned, kept: as for `bound`.
        measured: the speed-up of whole runs.
        unaligned: a width that is no multiple of 32, if the pruned model has one.
    """
    allowed, short = bound(dense, pruned, kept)
    reached = measured / allowed
    share = dense.mlp / dense.total
    why = (
        f"the MLPs take {share:.0%} of the dense model's time; {1 - kept:.0%} of their weights "
        f"less can make it {allowed:.2f} × as fast, and {measured:.2f} × was measured"
    )
    others = [part for part in ("attention", "head", "rest") if getattr(dense, part) > 0]
    largest = max(others, key=lambda part: getattr(dense, part))
    names = _NAMES | ({"rest": _ALL_BUT_MLPS} if others == ["rest"] else {})
    if measured < 1:
        why += ": pruning did not pay"
    if reached >= REACHED:
        why += f"; the most that is left is {names[largest]}"
    elif short == "mlp":
        expected = _times(pruned.mlp, dense.mlp * kept)
        why += f"; the pruned MLPs take {expected:.2f} times what their weights should"
        if unaligned is not None:
            why += f": a width of {unaligned} is no multiple of {_ALIGNED}"
    else:
        slower = _times(getattr(pruned, short), getattr(dense, short))
        why += f"; {names[short]} took {slower:.2f} times as long as in the dense model"
    return Bound(allowed, reached, why)


def _times(now: float, before: float) -> float:
    return now / before if before else math.inf


def bounds(
    dense: nn.Module,
    pruned: nn.Module,
    profiles: tuple[Parts, Parts],
    measured: float,
) -> Bound:
    """Return the bound of one model against the dense one.

    Args:
        dense, pruned: the models.
        profiles: their runs' parts, in that order.
        measured: the speed-up of whole runs.
    """
    kept = mlp_weights(pruned) / mlp_weights(dense)
    return explain(*profiles, kept, measured, _unaligned(pruned))
