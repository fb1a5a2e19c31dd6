"""Intervals, tests and knees against cases computed by hand."""

import math

import numpy as np
import pytest

from prunekit.errors import InputError
from prunekit.experiment.knee import fitted_knee, within
from prunekit.experiment.statistics import accuracy, holm, loss, paired, sign_flip_test


def test_the_interval_is_that_of_the_binomial_where_there_is_one_seed():
    found = accuracy([[1] * 120 + [0] * 80])
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert found.value == 0.6
    assert found.low == pytest.approx(0.6 - half, abs=0.008)
    assert found.high == pytest.approx(0.6 + half, abs=0.008)
    assert accuracy([[1] * 120 + [0] * 80]) == found


def test_seeds_that_agree_narrow_nothing_and_seeds_that_differ_widen():
    one = [1] * 120 + [0] * 80
    alike = accuracy([one, one, one])
    alone = accuracy([one])
    assert alike.high - alike.low == pytest.approx(alone.high - alone.low, rel=0.05)
    apart = accuracy([[1] * 200, [1] * 40 + [0] * 160])
    assert apart.value == 0.6
    assert apart.low < 0.25  # both draws of a seed may be the bad one
    assert apart.high == pytest.approx(1.0)


def test_where_nothing_varies_the_exact_binomial_bound_stands():
    none, all_ = accuracy([[0] * 100]), accuracy([[1] * 100])
    assert none.low == 0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 100))  # Clopper and Pearson
    assert (all_.low, all_.high) == (pytest.approx(0.025 ** (1 / 100)), 1.0)


@pytest.mark.parametrize("correct", [[], [[]], [[1, 0], [1]]])
def test_no_accuracy_comes_of_nothing(correct):
    with pytest.raises(InputError, match="expected equal, not 0"):
        accuracy(correct)


@pytest.mark.parametrize(
    ("gaps", "p"),
    [
        ([1] * 5, 2 / 32),
        ([-1] * 5, 2 / 32),
        ([1] * 8 + [-1] * 2 + [0] * 7, 2 * (1 + 10 + 45) / 1024),
        ([1, 1, 1, -1], 10 / 16),  # sums of four signs that reach 2
        ([2, 1], 2 / 4),
        ([2, -1], 1.0),
        ([3, 1, 1], 2 / 8),
        ([0, 0], 1.0),
        ([], 1.0),
    ],
)
def test_the_sign_flip_test_is_exact(gaps, p):
    assert sign_flip_test(gaps) == pytest.approx(p)


def test_with_one_seed_each_the_paired_test_is_mcnemars():
    first = [1] * 30 + [1] * 8 + [0] * 2 + [0] * 10
    second = [1] * 30 + [0] * 8 + [1] * 2 + [0] * 10
    found = paired([first], [second])
    assert (found.better, found.worse) == (8, 2)
    assert found.p == pytest.approx(112 / 1024)
    assert found.difference.value == pytest.approx(6 / 50)
    # The variance of a paired difference: (b + c - (b - c)^2 / n) / n^2
    half = 1.96 * math.sqrt(10 - 36 / 50) / 50
    assert found.difference.low == pytest.approx(0.12 - half, abs=0.02)
    assert found.difference.high == pytest.approx(0.12 + half, abs=0.02)


def test_seeds_are_averaged_before_they_are_compared():
    found = paired([[1, 1, 0, 1]], [[1, 0, 0, 1], [1, 1, 0, 0]])
    assert (found.better, found.worse) == (2, 0)
    assert found.difference.value == pytest.approx(0.25)


def test_other_problems_are_refused():
    with pytest.raises(InputError, match="got 2 and 3 problems; expected the same"):
        paired([[1, 0]], [[1, 0, 1]])


def test_holm_multiplies_the_least_p_by_their_number_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_losss_error_is_that_of_the_prompts_and_what_seeds_differ_by():
    one = loss([2.0], [0.1])
    assert (one.low, one.high) == (pytest.approx(2 - 0.196), pytest.approx(2 + 0.196))
    same = loss([2.0, 2.0], [0.1, 0.1])
    assert same.high - same.low == pytest.approx(0.392)
    two = loss([1.0, 3.0], [0.1, 0.1])
    assert two.value == 2
    assert two.high == pytest.approx(2 + 1.96 * math.sqrt(0.01 + 2 / 2))


def test_the_fitted_knee_is_where_two_lines_meet():
    x = np.arange(0, 0.55, 0.05)
    y = 0.9 - 0.1 * x - 2 * np.maximum(x - 0.2, 0)
    bend = fitted_knee(list(zip(x, y, strict=True)))
    assert bend.at == pytest.approx(0.2, abs=0.003)
    assert bend.before == pytest.approx(-0.1, abs=0.03)
    assert bend.after == pytest.approx(-2.1, abs=0.03)
    assert bend.explained > 0.99
    rising = fitted_knee(list(zip(x, 1 - y, strict=True)), falls=False)
    assert rising.at == pytest.approx(bend.at)


def test_a_line_has_no_knee_nor_has_a_bend_upward_nor_too_few_points():
    x = np.arange(0, 0.55, 0.05)
    assert fitted_knee(list(zip(x, 0.9 - x, strict=True))) is None
    flattens = 0.9 - 2 * np.minimum(x, 0.2)
    assert fitted_knee(list(zip(x, flattens, strict=True))) is None
    assert fitted_knee([(0, 1), (0.1, 1), (0.2, 0.5), (0.3, 0)]) is None


def test_what_is_tolerated_ends_with_the_first_that_is_not():
    points = [(0.3, 0.95), (0.1, 0.97), (0.2, 0.89)]
    assert within(points, 0.9) == (0.1, 0.2)
    assert within(points, 0.8) == (0.3, None)
    assert within(points, 0.99) == (0.0, 0.1)
