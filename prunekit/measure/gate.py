"""Whether a model became slower than a saved baseline says, on a noisy machine or on another one.

Every test is timed between two runs of a reference of plain torch, which no change of ours touches;
what is kept and compared is the ratio, round by round, so that a slower machine is no regression,
and one that is slow for a second hardly noise. Intervals decide, not medians; what they leave
undecided is timed again, alone, until time is up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import torch
from torch import nn

from prunekit.errors import InputError
from prunekit.files import read_json, write_json
from prunekit.integrations.fixed_shapes import EAGER, Way
from prunekit.measure.comparison import cases_of
from prunekit.measure.provenance import provenance
from prunekit.measure.throughput import mlps_case
from prunekit.measure.timing import seconds_of, warm_up
from prunekit.measure.waiting import Waiting

KIND, SCHEMA = "prunekit bench baseline", 3
ROUNDS = 11  # of a baseline, and before the first decision: fewer give no interval of 99.9 %
MLP_PASSES = 8  # of MLPs alone, a token each: one is too short to be timed
MLP_TIMES = 4  # that MLPs alone are timed a round: they are the shortest tests, and tell most
ALARM, CALM = 0.999, 0.95  # how sure an interval has to be to raise an alarm, and to raise none
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


def reference_cases(device: torch.device) -> dict[str, Callable[[], None]]:
    """What the machine itself can do: pp is bound by products in fp32, tg by reading matrices."""
    generator = torch.Generator().manual_seed(0)
    count, size = (16, 2048) if device.type == "cpu" else (64, 4096)
    matrices = [torch.randn(size, size, generator=generator).to(device) for _ in range(count)]
    many = torch.randn(256, size, generator=generator).to(device)

    def products() -> None:
        for matrix in matrices[:4]:
            many @ matrix
        _wait(device)

    def reading() -> None:
        for matrix in 2 * matrices:
            matrix @ many[0]
        _wait(device)

    return {"pp": products, "tg": reading}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(
    models: Mapping[str, nn.Module],
    *,
    prompt: int,
    generate: int,
    batch: Sequence[int],
    way: Way = EAGER,
) -> tuple[list[str], More]:
    """Return the tests' names, and what times so many rounds more of some, as ratios.

    Beside every prefill and decode stand the model's MLPs alone, on as many tokens: what becomes
    slower there is a part of the whole, and might be too small a part of it to be seen. They are
    timed `MLP_TIMES` times a round.

    Args:
        models, prompt, generate, batch, way: as for `bench_models`; MLPs alone always run eagerly.
    """
    cases = cases_of(models, prompt, generate, batch, way)
    runs = {f"{name} {test} batch {size}": run for (name, test, size), (run, _) in cases.items()}
    for size in batch:
        for name, model in models.items():
            many = mlps_case(model, size, prompt, 1), mlps_case(model, size, 1, MLP_PASSES)
            for test, run in zip((f"pp{prompt}", f"tg{MLP_PASSES}"), many, strict=True):
                if run is not None:
                    runs[f"{name} MLPs {test} batch {size}"] = run
    device = next(iter(models.values())).device
    references = reference_cases(device)
    warm = False

    def more(rounds: int, tests: Collection[str]) -> Ratios:
        nonlocal warm
        if not warm:
            warm_up({**references, **runs})
        warm = True
        found: Ratios = {test: [] for test in tests}
        for _ in range(rounds):
            for kind, reference in references.items():
                alike = [test for test in tests if test.split()[-3][:2] == kind]
                short = [test for test in alike if " MLPs " in test]
                order = alike + (MLP_TIMES - 1) * short
                for test, each in zip(order, between(map(runs.get, order), reference), strict=True):
                    found[test].append(each)
        return found

    return list(runs), more


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
        limit_s: no further rounds are begun after so many seconds.
        clock: in seconds; waited: the share of waiting meanwhile, as `Waiting` tells it. Small
            operations of several threads suffer more from it than the reference does, so above
            `WAITED` what would be an alarm stays undecided.
    """
    waited = waited or Waiting().share
    until = clock() + limit_s
    now: Ratios = {test: [] for test in before}
    found: dict[str, Verdict] = {}
    left = list(before)
    while True:
        for test, ratios in more(ROUNDS, left).items():
            now[test] += ratios
            found[test] = verdict(test, before[test], now[test], most)
        left = [test for test in before if found[test].verdict == UNDECIDED]
        if not left or clock() >= until:
            break
    verdicts = [found[test] for test in before]
    if waited() > WAITED:
        return [replace(v, verdict=UNDECIDED) if v.verdict == REGRESSED else v for v in verdicts]
    return verdicts


def save_baseline(path: str | Path, ratios: Ratios, options: dict[str, Any]) -> None:
    """Write a baseline, with what it was measured with."""
    facts = {"kind": KIND, "schema": SCHEMA, "options": options, "ratios": ratios}
    write_json(path, facts | {"provenance": provenance()})


def read_baseline(path: str | Path, options: dict[str, Any]) -> Ratios:
    """Read a baseline.

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
    return value["ratios"]
