"""Whether a model became slower than a saved baseline says, on a noisy machine or on another one.

Every test is timed between two runs of the same by a plain model, which no change of ours touches;
what is kept and compared is the ratio, round by round, so that a slower machine is no regression,
and one that is slow for a second hardly noise. Intervals decide, not medians; what they leave
undecided is timed again, alone, until time is up. Rounds of one moment share its noise, which no
interval of theirs tells, so that an alarm has to be raised three times in a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

from torch import nn

from prunekit.errors import InputError
from prunekit.files import read_json, write_json
from prunekit.integrations.fixed_shapes import EAGER, Way
from prunekit.integrations.plain_llama import Shape
from prunekit.measure.comparison import cases_of
from prunekit.measure.provenance import provenance
from prunekit.measure.throughput import mlps_case
from prunekit.measure.timing import seconds_of, warm_up
from prunekit.measure.waiting import Waiting

KIND, SCHEMA = "prunekit bench baseline", 4
ROUNDS = 11  # of a baseline, and before the first decision: fewer give no interval of 99.9 %
MLP_PASSES = 8  # of MLPs alone, a token each: one is too short to be timed
MLP_TIMES = 4  # that MLPs alone are timed a round: they are the shortest tests, and tell most
ALARM, CALM = 0.999, 0.95  # how sure an interval has to be to raise an alarm, and to raise none
ALARMS = 3  # stretches of rounds in a row that each have to be too slow, before it is an alarm
WAITED = 0.10  # share of waiting for a processor above which a model may well be slower for that
OK, REGRESSED, UNDECIDED = "ok", "regressed", "undecided"

Ratios = dict[str, list[float]]
More = Callable[[int, Collection[str]], Ratios]


@dataclass(frozen=True)
class Verdict:
    """One test against its baseline.

    Attributes:
        test: as in ``demo pp512 batch 1``.
        before, now: medians of the time over the reference's.
        timings: how many there were now.
        change: now / before - 1, the median over all pairs of rounds; low and high are its 95 %
            interval.
        verdict: ok, regressed or undecided.
    """

    test: str
    before: float
    now: float
    timings: int
    change: float
    low: float
    high: float
    verdict: str


def measured(
    models: Mapping[str, nn.Module],
    *,
    prompt: int,
    generate: int,
    batch: Sequence[int],
    way: Way = EAGER,
    shape: Shape | None = None,
) -> tuple[list[str], More]:
    """Return the tests' names, and what times so many rounds more of some, as ratios.

    Beside every prefill and decode stand the model's MLPs alone, on as many tokens: what becomes
    slower there is a part of the whole, and might be too small a part of it to be seen. They are
    timed `MLP_TIMES` times a round.

    Args:
        models, prompt, generate, batch, way: as for `bench_models`; MLPs alone always run eagerly.
        shape: of the reference, as the baseline has it; by default the first model's.
    """
    first = next(iter(models.values()))
    reference = (shape or Shape.of(first)).build(first.device, first.dtype)
    sizes = {"prompt": prompt, "generate": generate, "batch": batch}
    cases = {f"{name} {kind}": run for name, kind, run in _cases(models, way=way, **sizes)}
    against = {kind: run for _, kind, run in _cases({"": reference}, **sizes)}
    warm = False

    def more(rounds: int, tests: Collection[str]) -> Ratios:
        nonlocal warm
        if not warm:
            warm_up({**against, **cases})
        warm = True
        found: Ratios = {test: [] for test in tests}
        for _ in range(rounds):
            for kind, other in against.items():
                order = [f"{name} {kind}" for name in models if f"{name} {kind}" in found]
                if kind.startswith("MLPs"):
                    order = MLP_TIMES * order
                for test, each in zip(order, between(map(cases.get, order), other), strict=True):
                    found[test].append(each)
        return found

    return list(cases), more


def _cases(
    models: Mapping[str, nn.Module],
    *,
    prompt: int,
    generate: int,
    batch: Sequence[int],
    way: Way = EAGER,
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """What runs a test, with the model's name and the test's: whole, then its MLPs alone."""
    for (name, test, size), (run, _) in cases_of(models, prompt, generate, batch, way).items():
        yield name, f"{test} batch {size}", run
    for size in batch:
        for name, model in models.items():
            for test, tokens, times in (
                (f"pp{prompt}", prompt, 1),
                (f"tg{MLP_PASSES}", 1, MLP_PASSES),
            ):
                if (run := mlps_case(model, size, tokens, times)) is not None:
                    yield name, f"MLPs {test} batch {size}", run


def between(
    cases: Iterable[Callable[[], object]], reference: Callable[[], object]
) -> Iterator[float]:
    """Time each case once, with the reference before it and after it; yields the ratios."""
    before = None
    for case in cases:
        before = before or seconds_of(reference)
        taken, after = seconds_of(case), seconds_of(reference)
        yield ratio(before, taken, after)
        before = after


def ratio(before: float, taken: float, after: float) -> float:
    """A time over the mean of the reference's before and after it."""
    return 2 * taken / (before + after)


def interval(before: Sequence[float], now: Sequence[float], level: float) -> tuple[float, float]:
    """Return where now / before lies with this probability, whatever the noise is like.

    Hodges' and Lehmann's shift of the logarithms, with the interval of the rank-sum test: order
    statistics of the ratios of all pairs, to which single rounds that something disturbed mean
    little. Source: Hollander, Wolfe, Chicken, Nonparametric Statistical Methods, section 4.3.
    """
    ratios = sorted(b / a for a in before for b in now)
    m, n = len(before), len(now)
    z = NormalDist().inv_cdf((1 + level) / 2)
    left = int(m * n / 2 - z * (m * n * (m + n + 1) / 12) ** 0.5)
    left = min(max(left, 0), (m * n - 1) // 2)
    return ratios[left], ratios[m * n - 1 - left]


def verdict(test: str, before: Sequence[float], now: Sequence[float], most: float) -> Verdict:
    """Hold the ratios of a test against its baseline's.

    Args:
        before, now: ratios of the time to the reference's, a round each.
        most: how much slower it may be, 0.05 for 5 %.

    Returns:
        regressed where the interval of 99.9 % lies above ``most``, ok where that of 95 % lies below
        it, undecided between them.
    """
    low, high = interval(before, now, CALM)
    said = UNDECIDED
    if min(len(before), len(now)) >= ROUNDS and interval(before, now, ALARM)[0] > 1 + most:
        said = REGRESSED
    elif high <= 1 + most:
        said = OK
    change = median(b / a for a in before for b in now) - 1
    return Verdict(test, median(before), median(now), len(now), change, low - 1, high - 1, said)


def decide(
    before: Ratios,
    more: More,
    most: float,
    limit_s: float,
    clock: Callable[[], float] = time.monotonic,
    waited: Callable[[], float] | None = None,
) -> list[Verdict]:
    """Time rounds until every test is decided, or for so many seconds.

    Args:
        before: the baseline's ratios.
        more: times so many rounds of the tests that it is told, as `measured` returns it.
        most: how much slower a test may be.
        limit_s: no further rounds are begun after so many seconds, but those that an alarm lacks.
        clock: in seconds; waited: the share of waiting meanwhile, as `Waiting` tells it. Small
            operations of several threads suffer more from it than the reference does, so above
            `WAITED` what would be an alarm stays undecided.
    """
    waited = waited or Waiting().share
    until = clock() + limit_s
    spells: dict[str, list[list[float]]] = {test: [] for test in before}
    found: dict[str, Verdict] = {}

    def doubtful(test: str) -> bool:
        said = found[test].verdict
        return said == REGRESSED and not _lasting(before[test], spells[test], most)

    left = list(before)
    while left:
        for test, ratios in more(ROUNDS, left).items():
            spells[test].append(ratios)
            now = list(chain.from_iterable(spells[test]))
            found[test] = verdict(test, before[test], now, most)
        left = [test for test in left if found[test].verdict == UNDECIDED or doubtful(test)]
        if clock() >= until:
            young = [test for test in left if doubtful(test) and len(spells[test]) < ALARMS]
            left = young if waited() <= WAITED else []
    waits = waited() > WAITED
    for test, each in found.items():
        if doubtful(test) or (waits and each.verdict == REGRESSED):
            found[test] = replace(each, verdict=UNDECIDED)
    return [found[test] for test in before]


def _lasting(before: Sequence[float], spells: Sequence[Sequence[float]], most: float) -> bool:
    """Whether each of the last stretches of rounds was too slow for itself."""
    slow = [median(spell) > (1 + most) * median(before) for spell in spells[-ALARMS:]]
    return len(slow) == ALARMS and all(slow)


def save_baseline(path: str | Path, ratios: Ratios, shape: Shape, options: dict[str, Any]) -> None:
    """Write a baseline, with what it was measured with and held against."""
    facts = {"kind": KIND, "schema": SCHEMA, "options": options, "ratios": ratios}
    facts["reference"] = asdict(shape)
    write_json(path, facts | {"provenance": provenance()})


def read_baseline(path: str | Path, options: dict[str, Any]) -> tuple[Ratios, Shape]:
    """Read a baseline, and what to hold against this time too.

    Raises:
        InputError: it is no such file, or was measured with other options.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("kind") != KIND or value.get("schema") != SCHEMA:
        raise InputError(f"--check: {path} is no baseline of this version; write one with --save")
    for name, wanted in options.items():
        if value["options"].get(name) != wanted:
            was = value["options"].get(name)
            raise InputError(f"--check: {path} was measured with {name} {was}, not {wanted}")
    return value["ratios"], Shape.read(value.get("reference"))
