"""Whether a model became slower than a saved baseline says, on a noisy machine or on another one.

Every test is timed in turn with a reference of plain torch, which no change of ours touches; what
is kept and compared is the ratio of the two, round by round, so that a slower machine is no
regression. Intervals decide, not medians, and rounds go on until they do or time is up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from prunekit.measure.timing import interleave, warm_up

KIND, SCHEMA = "prunekit bench baseline", 2
ROUNDS = 11  # of a baseline, and before the first decision: fewer give no interval of 99.9 %
MLP_PASSES = 8  # of MLPs alone, a token each: one is too short to be timed
ALARM, CALM = 0.999, 0.95  # how sure an interval has to be to raise an alarm, and to raise none
OK, REGRESSED, UNDECIDED = "ok", "regressed", "undecided"

Ratios = dict[str, list[float]]


@dataclass(frozen=True)
class Verdict:
    """One test against its baseline.

    Attributes:
        test: as in ``demo pp512 batch 1``.
        before, now: medians of the time over the reference's.
        change: now / before - 1, the median over all pairs of rounds; low and high are its 95 %
            interval.
        verdict: ok, regressed or undecided.
    """

    test: str
    before: float
    now: float
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
        for matrix in matrices[:2]:
            many @ matrix
        _wait(device)

    def reading() -> None:
        for matrix in matrices:
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
) -> Callable[[int], Ratios]:
    """Return what times so many rounds more of every test, as ratios to the reference.

    Beside every prefill and decode stand the model's MLPs alone, on as many tokens: what becomes
    slower there is a part of the whole, and might be too small a part of it to be seen.

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

    def more(rounds: int) -> Ratios:
        nonlocal warm
        if not warm:
            warm_up({**references, **runs})
        warm = True
        taken = interleave({**references, **runs}, rounds, warmup=0)
        return {
            test: [t / r for t, r in zip(taken[test], taken[test.split()[-3][:2]], strict=True)]
            for test in runs
        }

    return more


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
    return Verdict(test, median(before), median(now), change, low - 1, high - 1, said)


def decide(
    before: Ratios,
    more: Callable[[int], Ratios],
    most: float,
    limit_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Verdict]:
    """Time rounds until every test is decided, or for so many seconds.

    Args:
        before: the baseline's ratios.
        more: as `measured` returns it.
        most: how much slower a test may be.
        limit_s: no further rounds are begun after so many seconds.
    """
    until = clock() + limit_s
    now: Ratios = {test: [] for test in before}
    while True:
        for test, ratios in more(ROUNDS).items():
            now[test] += ratios
        found = [verdict(test, before[test], now[test], most) for test in before]
        if all(each.verdict != UNDECIDED for each in found) or clock() >= until:
            return found


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
