"""Figures in words: what claims, reports and headlines write them with."""

from __future__ import annotations

from prunekit.experiment.statistics import Interval


def percent(share: float) -> str:
    """A sparsity: "20.8 %"."""
    return f"{100 * share:.1f} %"


def share(of_one: float) -> str:
    """A share in whole percent: "95 %"."""
    return f"{100 * of_one:.0f} %"


def interval(found: Interval) -> str:
    """An accuracy with its interval: "0.920 (0.880 to 0.955)"."""
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def points_of(found: Interval) -> str:
    """A difference of accuracies in points: "+3.5 points, +1.0 to +6.0"."""
    ends = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f"{100 * found.value:+.1f} points, {ends}"


def at(sparsity: float) -> str:
    """Where on a curve: "at 20.8 %", or "dense"."""
    return f"at {percent(sparsity)}" if sparsity else "dense"


def nats(found: Interval | None) -> str:
    """A loss, which may not be finite."""
    return "not finite" if found is None else f"{found.value:.3f}"


def p_value(p: float) -> str:
    """A p value: "= 0.031" or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
