"""The robustness knee: how much can go before the loss shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
