"""What the paper claims, and whether it holds in a run: in words, from the numbers alone.

Source:
    arXiv 2604.27115.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prunekit.experiment.analysis import (
    COLLAPSE_RISE,
    COLLAPSED,
    TOLERATED,
    Pooled,
    Run,
    Way,
    collapsed,
    curve,
    tolerated,
)
from prunekit.experiment.knee import fitted_knee
from prunekit.experiment.statistics import holm, paired
from prunekit.experiment.words import at, interval, nats, p_value, percent, points_of, share

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
LEVEL = 0.05
USEFUL = 0.5  # of the dense accuracy
_AROUND_10 = (0.05, 0.15)
_AROUND_THIRD = (0.28, 0.37)
_KNEE = (0.15, 0.20)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, whether it holds, and why."""

    title: str
    subject: str
    verdict: str
    text: str


def claims(run: Run) -> list[Claim]:
    """Every claim that the run has something to say of; of the others, that it has not."""
    task = run.tasks[0] if run.tasks else None
    found: list[Claim] = []
    for title, judge, needs in _CLAIMS:
        said = [Claim(title, *each) for each in judge(run, task)]
        found += said or [Claim(title, "", OPEN, f"{needs}.")]
    return found


def _of(run: Run, strategy: str, *, recovered: bool = False) -> dict[Way, Sequence[Pooled]]:
    return {
        way: points
        for way, points in run.ways.items()
        if way.strategy == strategy and bool(way.recovery) == recovered
    }


Said = Iterator[tuple[str, str, str]]


def _selective_beats_random(run: Run, task: str | None) -> Said:
    for way, points in _of(run, "selective").items():
        for other, controls in _of(run, "random").items():
            if other.compensate not in ("none", way.compensate):
                continue
            by_sparsity = {p.asked: p for p in controls}
            pairs = [(p, by_sparsity[p.asked]) for p in points if p.asked in by_sparsity]
            if pairs:
                judge = _by_problems if task else _by_loss
                yield f"{way.label} against {other.label}", *judge(pairs, task)


def _by_problems(pairs: Sequence[tuple[Pooled, Pooled]], task: str) -> tuple[str, str]:
    tests = [paired(a.correct[task], b.correct[task]) for a, b in pairs]
    ps = holm([test.p for test in tests])
    gaps = [test.difference.value for test in tests]
    problems = len(pairs[0][0].correct[task][0])
    figures = "; ".join(
        f"{percent(a.sparsity)}: {a.accuracy[task].value:.3f} against {b.accuracy[task].value:.3f} "
        f"({points_of(test.difference)}, p {p_value(p)})"
        for (a, b), test, p in zip(pairs, tests, ps, strict=True)
    )
    verdict, count = _majority(gaps, ps)
    return verdict, (
        f"Ahead at {sum(g > 0 for g in gaps)} of {len(gaps)} sparsities, significantly at {count} "
        f"(exact sign-flip test over {problems} problems, seeds averaged, Holm's correction). "
        f"{figures}."
    )


def _by_loss(pairs: Sequence[tuple[Pooled, Pooled]], _: None) -> tuple[str, str]:
    known = [(a, b, a.loss["target"], b.loss["target"]) for a, b in pairs]
    # A loss that is not finite is worse than any other.
    gaps, apart, figures = [], [], []
    for a, _b, mine, theirs in known:
        if mine is None or theirs is None:
            gaps.append(float(theirs is None) - float(mine is None))
            apart.append(gaps[-1] != 0)
        else:
            gaps.append(theirs.value - mine.value)
            apart.append(mine.high < theirs.low or theirs.high < mine.low)
        figures.append(f"{percent(a.sparsity)}: {nats(mine)} against {nats(theirs)}")
    verdict, count = _majority(gaps, [0.0 if each else 1.0 for each in apart])
    return verdict, (
        f"Lower loss at {sum(g > 0 for g in gaps)} of {len(gaps)} sparsities, with 95 % intervals "
        f"apart at {count}. {'; '.join(figures)} nats a token."
    )


def _majority(gaps: Sequence[float], ps: Sequence[float]) -> tuple[str, int]:
    """Holds where the first is significantly ahead at half of the sparsities or more and
    significantly behind at none; fails where it is behind at one, or ahead nowhere."""
    ahead = sum(g > 0 and p < LEVEL for g, p in zip(gaps, ps, strict=True))
    behind = any(g < 0 and p < LEVEL for g, p in zip(gaps, ps, strict=True))
    if behind or not any(g > 0 for g in gaps):
        return FAILS, ahead
    return (HOLDS if 2 * ahead >= len(gaps) else OPEN), ahead


def _reverse_collapses(run: Run, task: str | None) -> Said:
    for way, points in _of(run, "reverse").items():
        near = [p for p in points if _AROUND_10[0] < p.sparsity <= _AROUND_10[1]]
        if near:
            point = min(near, key=lambda p: abs(p.sparsity - 0.1))
            yield f"{way.label} at {percent(point.sparsity)}", *_collapse(run, point, task)


def _collapse(run: Run, point: Pooled, task: str | None) -> tuple[str, str]:
    rise = point.rise(run.dense)
    lost = (
        "the loss is not finite" if rise is None else f"the loss rises by {rise:.2f} nats a token"
    )
    if task is None:
        verdict = HOLDS if collapsed(point, run.dense, None) else FAILS
        return (
            verdict,
            f"{lost[0].upper()}{lost[1:]}; collapse means more than {COLLAPSE_RISE:.2f}.",
        )
    found, dense = point.accuracy[task], run.dense.accuracy[task].value
    bound = COLLAPSED * dense
    verdict = HOLDS if found.high < bound else FAILS if found.low >= bound else OPEN
    return verdict, (
        f"Accuracy {interval(found)} of dense {dense:.3f}, where collapse means under a fifth, "
        f"{bound:.3f}; {lost}."
    )


def _third_is_useful(run: Run, task: str | None) -> Said:
    for way, points in _of(run, "selective").items():
        near = [p for p in points if _AROUND_THIRD[0] <= p.sparsity <= _AROUND_THIRD[1]]
        for point in near if task else ():
            found, dense = point.accuracy[task], run.dense.accuracy[task].value
            bound = USEFUL * dense
            verdict = HOLDS if found.low >= bound else FAILS if found.high < bound else OPEN
            yield (
                f"{way.label} at {percent(point.sparsity)}",
                verdict,
                f"Accuracy {interval(found)} of dense {dense:.3f}; useful means at least half, "
                f"{bound:.3f}.",
            )


def _knee_at_15_to_20(run: Run, task: str | None) -> Said:
    for way, points in _of(run, "selective").items():
        if len(points) >= 2:
            yield way.label, *_knee_of(run, points, task)


def _knee_of(run: Run, points: Sequence[Pooled], task: str | None) -> tuple[str, str]:
    bend = fitted_knee(curve(run, points, task), falls=task is not None)
    last, beyond = tolerated(run, points, task)
    low, high = _KNEE
    fits = [low <= bend.at <= high] if bend else []
    # The curve leaves what is tolerated somewhere between these two.
    if beyond is not None:
        fits.append(last <= high and beyond >= low)
    elif last > high:
        fits.append(False)
    verdict = OPEN if len(set(fits)) != 1 else HOLDS if fits[0] else FAILS
    keeps = f"keeps {share(TOLERATED)} of the dense accuracy"
    if not task:
        keeps = "keeps the perplexity within 5 % of the dense model's"
    if beyond is None:
        said = f"it {keeps} at all sparsities measured, {percent(last)} the largest"
    elif not last:
        said = f"at {percent(beyond)} it no longer {keeps}"
    else:
        said = f"it {keeps} up to {percent(last)}"
        said += f" and no longer at {percent(beyond)}" if beyond != last else ""
    fitted = (
        f"Two lines fit best with a bend at {percent(bend.at)}, which takes away "
        f"{share(bend.explained)} of one line's squared error"
        if bend
        else "No bend fits better than one line, or too few sparsities lie before the collapse"
    )
    return verdict, f"{fitted}; {said}."


def _training_recovers(run: Run, task: str | None) -> Said:
    for way, points in (
        w for s in ("selective", "random", "reverse") for w in _of(run, s, recovered=True).items()
    ):
        before = run.ways.get(Way(way.strategy, way.criterion, way.compensate), ())
        by_sparsity = {p.asked: p for p in before}
        pairs = [(by_sparsity[p.asked], p) for p in points if p.asked in by_sparsity]
        if pairs:
            yield way.label, *_regained(run, pairs, task)


def _regained(
    run: Run, pairs: Sequence[tuple[Pooled, Pooled]], task: str | None
) -> tuple[str, str]:
    shares, figures = [], []
    for before, after in pairs:
        if task:
            dense = run.dense.accuracy[task].value
            low, high = before.accuracy[task].value, after.accuracy[task].value
            test = paired(after.correct[task], before.correct[task])
            said = f"accuracy {low:.3f} to {high:.3f} of dense {dense:.3f} (p {p_value(test.p)})"
            said += f", {share(high / dense)} of it" if dense else ""
            lost, won = dense - low, high - low
        else:
            lost, after_rise = before.rise(run.dense), after.rise(run.dense)
            if lost is None or after_rise is None:
                continue
            won = lost - after_rise
            said = f"rise of the loss {lost:.3f} to {after_rise:.3f} nats a token"
        if lost > 0.02:
            shares.append(won / lost)
            said += f"; {share(shares[-1])} of what was lost"
        figures.append(f"{percent(before.sparsity)}: {said}")
    if not shares:
        return OPEN, f"There was nothing to regain. {'. '.join(figures)}."
    mean = sum(shares) / len(shares)
    verdict = HOLDS if mean >= 0.5 else FAILS if mean < 0.1 else OPEN
    return verdict, f"On average {share(mean)} of what was lost came back. {'. '.join(figures)}."


def _memory_falls(run: Run, _: str | None) -> Said:
    found = sorted(
        (each["sparsity"], each["memory"]["peak_bytes"])
        for each in run.speed.values()
        if "memory" in each
    )
    if len(found) >= 2:
        steps = [b < a for (_, a), (_, b) in itertools.pairwise(found)]
        verdict = HOLDS if all(steps) else FAILS if found[-1][1] >= found[0][1] else OPEN
        figures = ", ".join(f"{size / 1e6:,.0f} MB {at(s)}" for s, size in found)
        yield "peak of loading and running, batch 1", verdict, f"{figures}."


def _throughput_rises(run: Run, _: str | None) -> Said:
    for test, name in (("tg", "decoding"), ("pp", "prefill")):
        found = sorted(
            ((each["sparsity"], each[test]) for each in run.speed.values() if test in each),
            key=lambda each: each[0],
        )
        if len(found) < 2:
            continue
        dense, last = found[0][1], found[-1][1]
        apart = last["low"] > dense["high"]
        verdict = (
            HOLDS if apart and last["speedup"] > 1 else FAILS if last["speedup"] <= 1 else OPEN
        )
        figures = ", ".join(
            f"{row['tokens_per_s']:.1f} tokens/s ({row['speedup']:.2f} ×) {at(s)}"
            for s, row in found
        )
        yield f"{name}, batch 1", verdict, f"{figures}."


_CLAIMS: tuple[tuple[str, Callable[[Run, str | None], Said], str], ...] = (
    (
        "Selective removal beats random removal",
        _selective_beats_random,
        "No sparsity has both a selective and a random cell",
    ),
    (
        "Reverse removal of about 10 % collapses the model",
        _reverse_collapses,
        "No reverse cell removes between 5 and 15 %",
    ),
    (
        "With 30 to 35 % removed selectively the model is still useful",
        _third_is_useful,
        "No selective cell removes between 28 and 37 %, or no task was solved",
    ),
    (
        "The robustness knee lies at 15 to 20 %",
        _knee_at_15_to_20,
        "No selective way has two sparsities",
    ),
    (
        "Fine-tuning recovers much",
        _training_recovers,
        "No pruned model was trained afterwards",
    ),
    ("Memory falls with sparsity", _memory_falls, "Memory was not measured"),
    ("Throughput rises with sparsity", _throughput_rises, "Speed was not measured"),
)
