"""Dense against pruned: prefill and decode throughput, interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from torch import nn

from prunekit.arch import find_mlps
from prunekit.errors import InputError
from prunekit.measure.amdahl import Bound, bounds
from prunekit.measure.energy import counters_of, joules_of
from prunekit.measure.memory import model_bytes, parameter_count
from prunekit.measure.parts import Parts, measure_parts
from prunekit.measure.provenance import provenance
from prunekit.measure.throughput import decode_case, prefill_case
from prunekit.measure.timing import confidence, interleave, summarise


@dataclass(frozen=True)
class Throughput:
    """One model, one test: tokens a second, and how that compares with the baseline.

    Attributes:
        model: the name it was given.
        test: pp512 (prefill of 512 tokens) or tg128 (decode of 128), as llama-bench names them.
        batch: sequences at once.
        tokens_per_s: median over the rounds; low and high are its quartiles.
        speedup: median over the rounds of the baseline's time by this one's, round by round.
        tokens_interval, speedup_interval: 95 % intervals of the two medians.
        bound: the largest speed-up that its widths allow, and what holds it back; None for the
            baseline, or where that was not asked for.
        joules_per_token: what the device took, idling included; None where nothing counts it.
    """

    model: str
    test: str
    batch: int
    tokens_per_s: float
    low: float
    high: float
    speedup: float
    tokens_interval: tuple[float, float]
    speedup_interval: tuple[float, float]
    bound: Bound | None = None
    joules_per_token: float | None = None

    @property
    def latency_s(self) -> float:
        """Seconds to the first token (of a prefill), or from one token to the next (decoding)."""
        if self.test.startswith("pp"):
            return self.batch * int(self.test[2:]) / self.tokens_per_s
        return self.batch / self.tokens_per_s


def cases_of(
    models: Mapping[str, nn.Module], prompt: int, generate: int, batch: Sequence[int]
) -> dict[tuple[str, str, int], tuple[Callable[[], None], int]]:
    """Return what runs a test, and how many tokens that is, by model, test and batch size.

    Raises:
        InputError: no model, or a size below 1.
    """
    if not models:
        raise InputError("bench: no model")
    if min(prompt, generate, *batch) < 1:
        raise InputError("bench: prompt, generate and batch must be at least 1")
    cases: dict[tuple[str, str, int], tuple[Callable[[], None], int]] = {}
    for size in batch:
        for name, model in models.items():
            cases[name, f"pp{prompt}", size] = prefill_case(model, size, prompt), size * prompt
        for name, model in models.items():
            case = decode_case(model, size, prompt, generate)
            cases[name, f"tg{generate}", size] = case, size * generate
    return cases


def bench_models(
    models: Mapping[str, nn.Module],
    *,
    prompt: int = 512,
    generate: int = 128,
    batch: Sequence[int] = (1,),
    rounds: int = 5,
    explain: bool = False,
) -> list[Throughput]:
    """Time any number of models against the first, in rounds that visit each test of each model.

    Args:
        models: by name; the first is the baseline.
        prompt: tokens of the prefill, and of the context that decoding starts from.
        generate: tokens decoded.
        batch: batch sizes.
        rounds: how often each is timed, after one warm-up.
        explain: profile every test too, for the bounds, and read its energy where that is counted.

    Raises:
        InputError: no model, or a size below 1.

    Cost:
        rounds + 1 prefills and decodes a model and batch size; three more to explain, and a second
        of each where energy is counted.
    """
    if rounds < 1:
        raise InputError(f"bench: got rounds {rounds}; expected at least 1")
    cases = cases_of(models, prompt, generate, batch)
    counters = counters_of(next(iter(models.values())).device) if explain else []
    seconds = interleave({key: run for key, (run, _) in cases.items()}, rounds, warmup=1)
    baseline = next(iter(models))
    rows = []
    for (name, test, size), (run, tokens) in cases.items():
        mine, dense = seconds[name, test, size], seconds[baseline, test, size]
        rates = [tokens / s for s in mine]
        ratios = [d / s for d, s in zip(dense, mine, strict=True)]
        rate, ratio = summarise(rates), median(ratios)
        joules = joules_of(run, counters)
        row = Throughput(
            name,
            test,
            size,
            *(rate.median, rate.low, rate.high, ratio),
            *(confidence(rates), confidence(ratios)),
            joules_per_token=None if joules is None else joules / tokens,
        )
        rows.append(row)
    if not explain:
        return rows
    profiles = {
        (name, test, size): measure_parts(models[name], run)
        for (name, test, size), (run, _) in cases.items()
    }
    return [_explained(row, models, baseline, profiles) for row in rows]


def _explained(
    row: Throughput,
    models: Mapping[str, nn.Module],
    baseline: str,
    profiles: Mapping[tuple[str, str, int], Parts],
) -> Throughput:
    """The row with its bound, unless it is the baseline's, or that of a model of other layers."""
    dense, model = models[baseline], models[row.model]
    if row.model == baseline or len(find_mlps(model, verify=False)) != len(
        find_mlps(dense, verify=False)
    ):
        return row
    both = (profiles[name, row.test, row.batch] for name in (baseline, row.model))
    return replace(row, bound=bounds(dense, model, tuple(both), row.speedup))


def bench(
    model: nn.Module,
    *,
    baseline: nn.Module | None = None,
    prompt: int = 512,
    generate: int = 128,
    batch: Sequence[int] = (1,),
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure one model, beside the dense one where it is given.

    Returns:
        {"rows": throughput rows, "models": parameters and bytes by name, "provenance": ...}.
    """
    models = {"model": model} if baseline is None else {"dense": baseline, "pruned": model}
    rows = bench_models(models, prompt=prompt, generate=generate, batch=batch, rounds=rounds)
    sizes = {
        name: {"parameters": parameter_count(m), "bytes": model_bytes(m)}
        for name, m in models.items()
    }
    return {"rows": [asdict(row) for row in rows], "models": sizes, "provenance": provenance()}
