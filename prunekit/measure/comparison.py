"""Dense against pruned: prefill and decode throughput, interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Protocol

from torch import nn

from prunekit.arch import find_mlps
from prunekit.errors import InputError
from prunekit.integrations.fixed_shapes import EAGER, Way
from prunekit.integrations.loading import TORCH_DTYPES
from prunekit.measure.amdahl import Bound, bounds
from prunekit.measure.energy import counters_of, joules_of
from prunekit.measure.memory import model_bytes, parameter_count
from prunekit.measure.parts import Parts, measure_parts, parts_by_leaving_out, without_mlps
from prunekit.measure.provenance import provenance
from prunekit.measure.throughput import decode_case, prefill_case
from prunekit.measure.timing import confidence, interleave, summarise, warm_up

Cases = dict[tuple[str, str, int], tuple[Callable[[], None], int]]


class Peer(Protocol):
    """Another engine, which runs the same models in the same rounds.

    Attributes:
        label: what it is called.
        dtype: of what it multiplies by.
    """

    label: str
    dtype: str

    def cases(self, prompt: int, generate: int, batch: Sequence[int]) -> Cases:
        """Its share of what `cases_of` gives."""


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
        engine: what ran it; its baseline is the first model's row of the same engine.
        dtype: of the weights.
        bound: the largest speed-up that its widths allow, and what holds it back; None for the
            baseline, or where that was not asked for.
        parts: where its time went; None where that was not asked for.
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
    engine: str
    dtype: str
    bound: Bound | None = None
    parts: Parts | None = None
    joules_per_token: float | None = None

    @property
    def latency_s(self) -> float:
        """Seconds to the first token (of a prefill), or from one token to the next (decoding)."""
        if self.test.startswith("pp"):
            return self.batch * int(self.test[2:]) / self.tokens_per_s
        return self.batch / self.tokens_per_s


def cases_of(
    models: Mapping[str, nn.Module],
    prompt: int,
    generate: int,
    batch: Sequence[int],
    way: Way = EAGER,
) -> Cases:
    """Return what runs a test, and how many tokens that is, by model, test and batch size.

    Raises:
        InputError: no model, a size below 1, or this machine cannot run it that way.
    """
    if not models:
        raise InputError("bench: no model")
    if min(prompt, generate, *batch) < 1:
        raise InputError("bench: prompt, generate and batch must be at least 1")
    way.check()
    cases: Cases = {}
    for size in batch:
        for name, model in models.items():
            case = prefill_case(model, size, prompt, way)
            cases[name, f"pp{prompt}", size] = case, size * prompt
        for name, model in models.items():
            case = decode_case(model, size, prompt, generate, way)
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
    way: Way = EAGER,
    peers: Sequence[Peer] = (),
) -> list[Throughput]:
    """Time any number of models against the first, in rounds that visit each test of each model.

    Args:
        models: by name; the first is the baseline.
        prompt: tokens of the prefill, and of the context that decoding starts from.
        generate: tokens decoded.
        batch: batch sizes.
        rounds: how often each is timed, after a `warm_up`.
        explain: profile every test too, for the bounds, and read its energy where that is counted.
        way: as transformers runs it, compiled, or as a CUDA graph.
        peers: engines that take part in the rounds, each against its own first model.

    Raises:
        InputError: no model, a size below 1, or this machine cannot run it that way.

    Cost:
        rounds + 3 prefills and decodes a model and batch size, at most. To explain three more, or,
        compiled or captured, as many of the dense model without its MLPs; and a second of each
        where energy is counted.
    """
    if rounds < 1:
        raise InputError(f"bench: got rounds {rounds}; expected at least 1")
    engine, baseline = str(way), next(iter(models), "")
    own = cases_of(models, prompt, generate, batch, way)
    found = {(engine, *key): case for key, case in own.items()}
    dtypes = {(engine, name): _short(model) for name, model in models.items()}
    for peer in peers:
        theirs = peer.cases(prompt, generate, batch)
        found |= {(peer.label, *key): case for key, case in theirs.items()}
        dtypes |= {(peer.label, name): peer.dtype for name, _, _ in theirs}
    runs: dict[Hashable, Callable[[], None]] = {key: run for key, (run, _) in found.items()}
    if explain and way.fixed:
        only = {baseline: models[baseline]}
        for (_, test, size), (run, _) in cases_of(only, prompt, generate, batch, way).items():
            runs[test, size] = _without_mlps(models[baseline], run)
    warm_up(runs)
    seconds = interleave(runs, rounds, warmup=0)
    rows = []
    for (label, name, test, size), (_, tokens) in found.items():
        mine, dense = seconds[label, name, test, size], seconds[label, baseline, test, size]
        rates = [tokens / s for s in mine]
        ratios = [d / s for d, s in zip(dense, mine, strict=True)]
        rate, ratio = summarise(rates), median(ratios)
        figures = rate.median, rate.low, rate.high, ratio, confidence(rates), confidence(ratios)
        rows.append(Throughput(name, test, size, *figures, label, dtypes[label, name]))
    if not explain:
        return rows

    def parts_of(row: Throughput) -> Parts:
        key = row.model, row.test, row.batch
        if way.fixed:
            return parts_by_leaving_out(seconds[(engine, *key)], seconds[row.test, row.batch])
        return measure_parts(models[row.model], own[key][0])

    rows = [replace(row, parts=parts_of(row)) if row.engine == engine else row for row in rows]
    dense_parts = {(r.test, r.batch): r.parts for r in rows if r.parts and r.model == baseline}
    counters = counters_of(models[baseline].device)
    return [
        replace(
            row,
            bound=_bound(row, models, baseline, dense_parts[row.test, row.batch]),
            joules_per_token=_joules(*found[row.engine, row.model, row.test, row.batch], counters),
        )
        for row in rows
    ]


def _joules(run: Callable[[], None], tokens: int, counters: list) -> float | None:
    joules = joules_of(run, counters)
    return None if joules is None else joules / tokens


def _short(model: nn.Module) -> str:
    """A dtype as the command line names it."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    return names.get(model.dtype, str(model.dtype).removeprefix("torch."))


def _without_mlps(model: nn.Module, run: Callable[[], None]) -> Callable[[], None]:
    def bare() -> None:
        with without_mlps(model):
            run()

    return bare


def _bound(
    row: Throughput, models: Mapping[str, nn.Module], baseline: str, dense_parts: Parts
) -> Bound | None:
    """None for the baseline, for a model of other layers, and where no profile was taken."""
    dense, model = models[baseline], models[row.model]
    same = len(find_mlps(model, verify=False)) == len(find_mlps(dense, verify=False))
    if row.parts is None or row.model == baseline or not same:
        return None
    return bounds(dense, model, (dense_parts, row.parts), row.speedup)


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
