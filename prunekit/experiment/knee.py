"""The robustness knee: how much can go before the loss, or the accuracy, shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunekit.errors import InputError

PERPLEXITY_RISE = 0.05


def knee(
    points: Sequence[tuple[float, float]], *, perplexity_rise: float = PERPLEXITY_RISE
) -> float:
    """The largest sparsity at which perplexity rises by less than 5 %, and below it never by more.

    Between two measured sparsities the rise of the loss is taken to be a straight line, from the
    dense model on, whose rise is 0.

    Args:
        points: (sparsity reached, rise of the mean loss in nats a token), in any order.
        perplexity_rise: 0.05 for 5 %, which is ln 1.05 = 0.0488 nats.

    Returns:
        The sparsity; the largest one measured where the limit was never reached, which is then a
        lower bound (`bounded` tells).

    Raises:
        InputError: there is no point, or one is out of range.
    """
    limit = math.log1p(perplexity_rise)
    left, before = 0.0, 0.0
    for sparsity, rise in _ascending(points):
        if rise >= limit:
            return left + (sparsity - left) * (limit - before) / (rise - before)
        left, before = sparsity, rise
    return left


def bounded(
    points: Sequence[tuple[float, float]], *, perplexity_rise: float = PERPLEXITY_RISE
) -> bool:
    """Whether the limit was reached among the points, so that `knee` is more than a lower bound."""
    return any(rise >= math.log1p(perplexity_rise) for _, rise in _ascending(points))


def shown(points: Sequence[tuple[float, float]]) -> str:
    """The knee as people read it: "31 %", or "≥ 40 %" where more might go."""
    return f"{'' if bounded(points) else '≥ '}{100 * knee(points):.1f} %"


def _ascending(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    ordered = sorted(points)
    if not ordered or any(not 0 < s < 1 or not math.isfinite(r) for s, r in ordered):
        raise InputError(f"knee: got {ordered}; expected sparsities within (0, 1), finite rises")
    return ordered


@dataclass(frozen=True)
class Bend:
    """Two straight lines that meet.

    Attributes:
        at: the sparsity where they do.
        before, after: their slopes, in the value's unit by sparsity.
        explained: the share of a single line's squared error that the second line takes away.
    """

    at: float
    before: float
    after: float
    explained: float


def fitted_knee(points: Sequence[tuple[float, float]], *, falls: bool = True) -> Bend | None:
    """The knee of the best fit by two lines that meet, the second one going down more steeply.

    Args:
        points: (sparsity, value), the dense model at 0 among them.
        falls: whether harm lets the value fall, as an accuracy, or rise, as a loss.

    Returns:
        None where there are fewer than five points, or no bend downward fits better than one line.

    Cost:
        200 least-squares fits.
    """
    x, y = np.asarray(sorted(points), float).reshape(-1, 2).T
    if len(x) < 5:
        return None
    line = np.stack([np.ones_like(x), x], 1)
    single = _squared_error(line, y)[0]
    best, least = None, single * (1 - 1e-9)
    for at in np.linspace(x[1], x[-2], 200):
        error, found = _squared_error(np.column_stack([line, np.maximum(x - at, 0)]), y)
        if error < least and (found[2] < 0) == falls:
            least = error
            best = Bend(float(at), float(found[1]), float(found[1] + found[2]), 1 - error / single)
    return best


def _squared_error(terms: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    found = np.linalg.lstsq(terms, y, rcond=None)[0]
    return float(((terms @ found - y) ** 2).sum()), found


def within(points: Sequence[tuple[float, float]], floor: float) -> tuple[float, float | None]:
    """The largest sparsity up to which no value lies below a floor, and the next one measured.

    Args:
        points: (sparsity, value), such as accuracies.
        floor: the least that is tolerated.

    Returns:
        0 where not even the first is; None for the next where the last is.
    """
    last = 0.0
    for sparsity, value in sorted(points):
        if value < floor:
            return last, sparsity
        last = sparsity
    return last, None
