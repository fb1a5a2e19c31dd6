"""Criteria: each gives every neuron a score, higher meaning keep."""

from __future__ import annotations

from prunekit.criteria import (  # noqa: F401 (they register)
    auto,
    fluctuation,
    magnitude,
    mean_abs,
    minitron,
    puzzletron_independent,
    random,
    reconstruction,
    rms,
    selectivity,
    taylor,
    two_stage,
    wanda,
    wanda_sp,
)
from prunekit.criteria.registry import CRITERIA, criterion, score

__all__ = ["CRITERIA", "criterion", "score"]
