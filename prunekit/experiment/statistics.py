"""Intervals and tests over problems that several models, or several seeds of one, have solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunekit.errors import InputError

CONFIDENCE = 0.95
_DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two models on the same problems.

    Attributes:
        difference: of the accuracies, with its interval.
        better, worse: problems on which the first did better or worse, seeds averaged.
        p: of the exact two-sided sign-flip test over those problems.
    """

    difference: Interval
    better: int
    worse: int
    p: float


def accuracy(correct: Sequence[Sequence[int]], *, confidence: float = CONFIDENCE) -> Interval:
    """The accuracy of one way of pruning, and its bootstrap interval.

    Problems and seeds are drawn anew independently of each other, since all seeds saw the same
    problems: an answer's luck and a seed's luck then both count. Where every problem has the same
    result the bootstrap is blind, and the exact binomial bound stands in.

    Args:
        correct: 0 or 1 by problem, one row a seed.

    Raises:
        InputError: no problem, or rows of different lengths.

    Source:
        The pigeonhole bootstrap: Owen, Annals of Applied Statistics 1 (2007).
    """
    table = _table(correct)
    value = float(table.mean())
    if value in (0.0, 1.0):
        bound = 1 - ((1 - confidence) / 2) ** (1 / table.shape[1])
        return Interval(value, max(value - bound, 0.0), min(value + bound, 1.0))
    return _interval(_drawn([table])[0], value, confidence)


def paired(
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    *,
    confidence: float = CONFIDENCE,
) -> Paired:
    """Whether one way of pruning solves more of the same problems than another.

    The test is the exact sign-flip test of the mean gap over problems, the seeds of each way
    averaged first; with one seed each it is McNemar's exact test. (The sign test is none of both:
    where one way has more seeds, equal accuracies do not make either sign as likely.) The interval
    is that of `accuracy`, with the same problems drawn for both.

    Args:
        first, second: 0 or 1 by problem, one row a seed; the problems are the same.

    Raises:
        InputError: no problem, or not the same number.
    """
    a, b = _table(first), _table(second)
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"paired test: got {a.shape[1]} and {b.shape[1]} problems; expected the same"
        )
    gaps = a.mean(0) - b.mean(0)
    better, worse = int((gaps > 1e-9).sum()), int((gaps < -1e-9).sum())
    one, two = _drawn([a, b])
    difference = _interval(one - two, float(gaps.mean()), confidence)
    whole = gaps * math.lcm(a.shape[0], b.shape[0])
    return Paired(difference, better, worse, sign_flip_test(np.rint(whole).astype(int)))


def sign_flip_test(gaps: Sequence[int]) -> float:
    """The exact two-sided p of a sum of gaps, were each as likely to have the other sign.

    Cost:
        The number of gaps times the sum of their sizes.
    """
    sizes = np.abs(np.asarray(gaps, int))
    total = int(sizes.sum())
    chances = np.ones(1)  # of every sum from -total to total, two apart
    for size in sizes[sizes > 0]:
        grown = np.zeros(len(chances) + size)
        grown[size:] = chances / 2
        grown[:-size] += chances / 2
        chances = grown
    sums = 2 * np.arange(total + 1) - total
    return min(1.0, float(chances[np.abs(sums) >= abs(int(np.sum(gaps)))].sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for being several, by Holm's method, in the order given."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def loss(values: Sequence[float], stderrs: Sequence[float]) -> Interval:
    """A mean loss over seeds, with an interval of 1.96 standard errors.

    Seeds share their prompts, so these's error does not shrink with the number of seeds; what
    differs between seeds adds to it.
    """
    values_, errors = np.asarray(values, float), np.asarray(stderrs, float)
    between = values_.var(ddof=1) / len(values_) if len(values_) > 1 else 0.0
    half = 1.96 * math.sqrt((errors**2).mean() + between)
    mean = float(values_.mean())
    return Interval(mean, mean - half, mean + half)


def _table(correct: Sequence[Sequence[int]]) -> np.ndarray:
    lengths = {len(row) for row in correct}
    if len(lengths) != 1 or not next(iter(lengths)):
        raise InputError(f"correct: got rows of {sorted(lengths)} problems; expected equal, not 0")
    return np.asarray(correct, float)


def _drawn(tables: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The means of many draws of problems, the same for all tables, and of each table's seeds."""
    generator = np.random.default_rng(0)
    problems = tables[0].shape[1]
    weights = generator.multinomial(problems, np.full(problems, 1 / problems), _DRAWS) / problems
    found = []
    for table in tables:
        seeds = table.shape[0]
        share = generator.multinomial(seeds, np.full(seeds, 1 / seeds), _DRAWS) / seeds
        found.append(np.einsum("ds,ds->d", share, weights @ table.T))
    return found


def _interval(draws: np.ndarray, value: float, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(min(low, value)), float(max(high, value)))
