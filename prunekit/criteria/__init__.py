"""Criteria: each gives every neuron a score, higher meaning keep."""

from __future__ import annotations

from prunekit.criteria import mean_abs, random, selectivity, wanda  # noqa: F401 (they register)
from prunekit.criteria.registry import CRITERIA, criterion, score

__all__ = ["CRITERIA", "criterion", "score"]
