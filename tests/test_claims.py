"""What a run is said to show, against runs made up by hand."""

import pytest

from prunekit.errors import InputError
from prunekit.experiment.analysis import Run, Way, collapsed, curve, pool, tolerated
from prunekit.experiment.claims import FAILS, HOLDS, OPEN, claims

N = 100
TITLES = ("Selective", "Reverse", "With 30", "The robustness", "Fine-tuning", "Memory", "Through")


def row(strategy, sparsity=0.0, solved=90, *, loss=1.0, seed=0, **cell):
    """A row whose model solves the first so many of 100 problems."""
    plain = {"criterion": "c" if strategy == "selective" else "", "compensate": "none"}
    plain |= {"recovery": "", "sparsity": sparsity, "strategy": strategy, "seed": seed} | cell
    correct = [1] * solved + [0] * (N - solved)
    task = {"accuracy": solved / N, "stderr": 0.0, "correct": correct, "generations": []}
    task["failures"] = {"wrong": N - solved} if solved < N else {}
    found = None if loss is None else {"loss": loss, "stderr": 0.01, "tokens": 9, "prompts": 9}
    return {
        "key": f"{plain}",
        "cell": plain,
        "sparsity": sparsity,
        "widths": [round(100 * (1 - sparsity))],
        "losses": {"target": found},
        "tasks": {"sums": task},
        "error": "",
    }


def run_of(*rows, tasks=True, speed=None):
    rows = [row("dense"), *rows]
    for each in rows:
        each["tasks"] = each["tasks"] if tasks else {}
    dense, ways = pool(rows)
    return Run({}, [], dense, ways, speed=speed or {})


def said(run, title):
    found = [claim for claim in claims(run) if claim.title.startswith(title)]
    assert found
    return found


def test_what_was_not_run_cannot_be_told():
    found = claims(run_of())
    assert [claim.verdict for claim in found] == [OPEN] * len(TITLES)
    assert found[-1].text == "Speed was not measured."
    assert all(c.title.startswith(t) for c, t in zip(found, TITLES, strict=True))


def test_seeds_are_pooled_and_a_run_without_a_dense_row_is_refused():
    _, ways = pool([row("dense"), row("random", 0.2, 40, seed=1), row("random", 0.2, 60, seed=2)])
    (point,) = ways[Way("random", "", "none")]
    assert point.accuracy["sums"].value == 0.5
    assert point.failures["sums"] == {"wrong": 100}
    with pytest.raises(InputError, match="no result of the dense model yet"):
        pool([row("random", 0.2)])


def test_selective_beats_random_by_an_exact_test_over_the_same_problems():
    good = run_of(
        *(row("selective", s, 85) for s in (0.1, 0.2)),
        *(row("random", s, solved, seed=k) for s, solved in ((0.1, 80), (0.2, 10)) for k in (1, 2)),
    )
    (claim,) = said(good, "Selective")
    assert claim.verdict == HOLDS
    assert claim.subject == "selective (c) against random"
    assert "Ahead at 2 of 2 sparsities, significantly at 1 " in claim.text
    # 5 problems to none: 2 / 2^5, which of two tests is the larger
    assert "10.0 %: 0.850 against 0.800 (+5.0 points, +1.0 to +10.0, p = 0.062)" in claim.text
    bad = run_of(row("selective", 0.1, 50), row("random", 0.1, 80))
    assert said(bad, "Selective")[0].verdict == FAILS
    close = run_of(row("selective", 0.1, 82), row("random", 0.1, 80))
    assert said(close, "Selective")[0].verdict == OPEN


def test_a_repaired_way_is_compared_with_random_repaired_or_not_and_a_plain_one_with_plain():
    run = run_of(
        row("selective", 0.1, compensate="lstsq"),
        row("selective", 0.1),
        row("random", 0.1, 10),
        row("random", 0.1, 10, compensate="lstsq"),
    )
    assert [claim.subject for claim in said(run, "Selective")] == [
        "selective (c + lstsq) against random",
        "selective (c + lstsq) against random (+ lstsq)",
        "selective (c) against random",
    ]


def test_without_a_task_losses_are_compared_by_their_intervals():
    rows = row("selective", 0.1, loss=1.1), row("random", 0.1, loss=1.5)
    (claim,) = said(run_of(*rows, tasks=False), "Selective")
    assert claim.verdict == HOLDS
    assert "10.0 %: 1.100 against 1.500 nats a token" in claim.text
    broken = row("selective", 0.1, loss=1.1), row("random", 0.1, loss=None)
    (claim,) = said(run_of(*broken, tasks=False), "Selective")
    assert claim.verdict == HOLDS
    assert "1.100 against not finite" in claim.text


@pytest.mark.parametrize(("solved", "verdict"), [(2, HOLDS), (17, OPEN), (40, FAILS)])
def test_reverse_collapses_where_the_whole_interval_is_under_a_fifth(solved, verdict):
    run = run_of(row("reverse", 0.2, 0), row("reverse", 0.1, solved, loss=4.0))
    (claim,) = said(run, "Reverse")
    assert claim.verdict == verdict
    assert "under a fifth, 0.180; the loss rises by 3.00 nats a token" in claim.text
    assert claim.subject == "reverse at 10.0 %"


def test_collapse_without_a_task_is_a_fivefold_perplexity_or_a_loss_that_is_not_finite():
    losses = (2.5, False), (2.7, True), (None, True)
    for loss, expected in losses:
        run = run_of(row("reverse", 0.1, loss=loss), tasks=False)
        (point,) = next(iter(run.ways.values()))
        assert collapsed(point, run.dense, None) is expected
        assert said(run, "Reverse")[0].verdict == (HOLDS if expected else FAILS)


@pytest.mark.parametrize(("solved", "verdict"), [(70, HOLDS), (45, OPEN), (20, FAILS)])
def test_useful_is_at_least_half_of_the_dense_accuracy(solved, verdict):
    (claim,) = said(run_of(row("selective", 0.35, solved)), "With 30")
    assert claim.verdict == verdict


def steps(accuracies):
    return [row("selective", s, solved) for s, solved in accuracies.items()]


def test_the_knee_holds_where_fit_and_tolerance_agree_on_15_to_20_percent():
    flat_then_steep = {0.05: 90, 0.1: 90, 0.15: 89, 0.2: 84, 0.25: 64, 0.3: 44, 0.35: 24}
    run = run_of(*steps(flat_then_steep))
    (claim,) = said(run, "The robustness")
    assert claim.verdict == HOLDS
    assert "up to 15.0 % and no longer at 20.0 %" in claim.text
    late = {0.1: 90, 0.2: 90, 0.3: 90, 0.4: 89, 0.5: 40, 0.6: 20}
    (claim,) = said(run_of(*steps(late)), "The robustness")
    assert claim.verdict == FAILS
    never = {0.1: 90, 0.2: 90, 0.3: 90, 0.4: 90}
    (claim,) = said(run_of(*steps(never)), "The robustness")
    assert claim.verdict == FAILS
    assert "at all sparsities measured, 40.0 % the largest" in claim.text


def test_a_curve_ends_with_the_first_collapse():
    run = run_of(*steps({0.1: 90, 0.2: 5, 0.3: 4, 0.4: 3}))
    (points,) = run.ways.values()
    assert curve(run, points, "sums") == [(0.0, 0.9), (0.1, 0.9), (0.2, 0.05)]
    assert tolerated(run, points, "sums") == (0.1, 0.2)


@pytest.mark.parametrize(("after", "verdict"), [(80, HOLDS), (50, OPEN), (41, FAILS)])
def test_a_recovery_is_judged_by_the_share_that_came_back(after, verdict):
    rows = row("selective", 0.5, 40), row("selective", 0.5, after, recovery="lora")
    (claim,) = said(run_of(*rows), "Fine-tuning")
    assert claim.verdict == verdict
    assert claim.subject == "selective (c), then lora"
    assert f"{100 * (after - 40) / 50:.0f} % of what was lost" in claim.text


def test_where_nothing_was_lost_there_is_nothing_to_recover():
    rows = row("selective", 0.1, 90), row("selective", 0.1, 90, recovery="lora")
    (claim,) = said(run_of(*rows), "Fine-tuning")
    assert claim.verdict == OPEN
    assert claim.text.startswith("There was nothing to regain")


def width(sparsity, rate, peak, spread=1.0):
    test = {"tokens_per_s": rate, "low": rate - spread, "high": rate + spread, "speedup": rate / 20}
    return {"sparsity": sparsity, "tg": test, "memory": {"peak_bytes": peak}}


@pytest.mark.parametrize(
    ("rate", "peak", "speed", "memory"),
    [(25, 80, HOLDS, HOLDS), (20.5, 120, OPEN, FAILS), (19, 90, FAILS, HOLDS)],
)
def test_speed_and_memory_are_judged_by_what_was_measured(rate, peak, speed, memory):
    found = run_of(speed={"100": width(0.0, 20, 100), "50": width(0.5, rate, peak)})
    assert said(found, "Through")[0].verdict == speed
    assert said(found, "Memory")[0].verdict == memory
    assert f"{rate:.1f} tokens/s ({rate / 20:.2f} ×) at 50.0 %" in said(found, "Through")[0].text
