"""Timing functions against each other, in rounds, so that a noisy machine is fair to all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of repeated measurements, in the unit they came in."""

    median: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Median, first and third quartile; of a single value, that value thrice."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(middle, low, high)


def confidence(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """An interval that holds the true median with this probability, whatever the distribution.

    From order statistics; where so few values cannot give it, their whole range. Source: Hollander,
    Wolfe, Chicken, Nonparametric Statistical Methods, section 3.6.
    """
    ordered, n = sorted(values), len(values)
    left, outside = 0, 0.5**n
    while left + 1 < n // 2 and 2 * (outside + math.comb(n, left + 1) * 0.5**n) <= 1 - level:
        left += 1
        outside += math.comb(n, left) * 0.5**n
    return ordered[left], ordered[n - 1 - left]


def interleave(
    cases: Mapping[Hashable, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[Hashable, list[float]]:
    """Time every case once a round, in turn.

    Args:
        cases: functions without arguments, by name; each waits for its own device.
        rounds: how many timings of each.
        warmup: rounds before them that are not counted.

    Returns:
        Seconds a call, in the order of the rounds, for each case.
    """
    seconds: dict[Hashable, list[float]] = {name: [] for name in cases}
    for round_ in range(warmup + rounds):
        for name, case in cases.items():
            taken = seconds_of(case)
            if round_ >= warmup:
                seconds[name].append(taken)
    return seconds


def seconds_of(case: Callable[[], object]) -> float:
    """How long one call took."""
    begun = time.perf_counter()
    case()
    return time.perf_counter() - begun


def warm_up(cases: Mapping[Hashable, Callable[[], object]], most: int = 3) -> int:
    """Run rounds that do not count until none gains more than 5 % on the one before.

    Args:
        cases: as for `interleave`.
        most: rounds; a machine that is never steady would go on for ever.

    Returns:
        How many rounds that took, two at least.
    """
    before = interleave(cases, 1, warmup=0)
    for done in range(2, most + 1):
        now = interleave(cases, 1, warmup=0)
        if all(now[name][0] >= 0.95 * before[name][0] for name in cases):
            return done
        before = now
    return most
