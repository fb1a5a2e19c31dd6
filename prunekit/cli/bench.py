"""`prunekit bench`: throughput and memory, dense and pruned interleaved in one run."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.checkpoint import save
from prunekit.cli import widths
from prunekit.cli.output import Output, count, megabytes
from prunekit.compact import compact_modules, prune
from prunekit.config import BenchConfig
from prunekit.errors import CheckError, InputError
from prunekit.experiment.twin import plan_of_widths, twin
from prunekit.integrations.loading import load
from prunekit.measure import gate
from prunekit.measure.comparison import Throughput, bench_models
from prunekit.measure.memory import model_bytes, parameter_count, peak_memory
from prunekit.measure.provenance import provenance

CONFIG = BenchConfig
EXAMPLES = """  prunekit bench small --baseline demo
  prunekit bench demo --sparsity 0.2,0.35,0.5 --compact
  prunekit bench small --baseline demo --batch 1,8 --prompt 256 --generate 64
  prunekit bench small --baseline demo --format md
  prunekit bench demo --widths
  prunekit bench small --json > small.json
  prunekit bench small --save baseline.json
  prunekit bench small --check baseline.json --max-regression 0.05"""


def run(config: BenchConfig, output: Output) -> int:
    """Measure every test of every model, and print a row each."""
    if config.widths:
        return widths.run(config, output)
    batch = _numbers("--batch", config.batch, int)
    models, folders = _models(config)
    if config.save or config.check:
        return _gate(config, _drop_in(models, config), batch, output)
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models.items():
            at = folders.get(name) or save(model, None, Path(scratch) / "model", force=True)
            peak = peak_memory(at, dtype=config.dtype, prompt=config.prompt)
            size = {"parameters": parameter_count(model), "bytes": model_bytes(model)}
            sizes[name] = size | peak
    models = _drop_in(models, config)
    rows = bench_models(
        models,
        prompt=config.prompt,
        generate=config.generate,
        batch=batch,
        rounds=config.rounds,
        explain=len(models) > 1,
    )
    facts = provenance()
    if config.format == "table":
        print_rows(rows, sizes, output)
        output.line(
            f"{facts['device']}; torch {facts['versions']['torch']}; median of {config.rounds} "
            "interleaved rounds, with 95 % intervals; bound: the speed-up that the removed weights "
            "allow if nothing else gets faster; peak: what loading and running added to a fresh "
            "process"
        )
        for row in rows:
            if row.joules_per_token is not None:
                spent = f"{row.joules_per_token:.3g} J a token, idling included"
                output.line(f"{row.model}, {row.test}, batch {row.batch}: {spent}")
        for row in rows:
            if row.bound is not None:
                output.line(f"{row.model}, {row.test}, batch {row.batch}: {row.bound.why}.")
    else:
        output.rows(config.format, [_flat(row, sizes[row.model]) for row in rows])
    output.json({"rows": [asdict(row) for row in rows], "models": sizes, "provenance": facts})
    return 0


def _drop_in(models: dict[str, nn.Module], config: BenchConfig) -> dict[str, nn.Module]:
    if not config.compact:
        return models
    return {name: compact_modules(model) for name, model in models.items()}


def _gate(
    config: BenchConfig, models: dict[str, nn.Module], batch: list[int], output: Output
) -> int:
    """Write a baseline, or hold the models against one."""
    if config.save and config.check:
        raise InputError("--save: not together with --check; save first, check later")
    if config.max_regression <= 0:
        raise InputError(f"--max-regression: got {config.max_regression}; expected 0.05, say")
    sizes = {"prompt": config.prompt, "generate": config.generate, "batch": batch}
    options = sizes | {"compact": config.compact, "models": list(models)}
    if config.save:
        ratios = gate.measured(models, **sizes)(max(config.rounds, gate.ROUNDS))
        gate.save_baseline(config.save, ratios, options)
        output.line(f"{config.save}: {len(ratios)} tests, times over a reference of plain torch")
        output.json({"baseline": config.save, "ratios": ratios})
        return 0
    before = gate.read_baseline(config.check, options)
    more = gate.measured(models, **sizes)
    found = gate.decide(before, more, config.max_regression, config.time_limit)
    table = [
        (v.test, f"{v.change:+.1%}", f"{v.low:+.1%} to {v.high:+.1%}", v.verdict) for v in found
    ]
    output.table(f"time against {config.check}", ("test", "change", "95 %", "verdict"), table)
    slower = [v.test for v in found if v.verdict == gate.REGRESSED]
    undecided = [v.test for v in found if v.verdict == gate.UNDECIDED]
    if undecided:
        output.note(f"not decided in {config.time_limit:.0f} s: {', '.join(undecided)}")
    output.json({"verdicts": [asdict(v) for v in found]})
    if slower:
        raise CheckError(f"slower by more than {config.max_regression:.0%}: {', '.join(slower)}")
    return 0


def _models(config: BenchConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The models by name, the dense one first, and where those that were loaded lie."""
    if not config.sparsity:
        names = [name for name in (config.baseline, config.model) if name]
        return {n: load(n, dtype=config.dtype) for n in names}, {n: n for n in names}
    if config.baseline:
        raise InputError("--sparsity: MODEL is then the dense one; leave --baseline out")
    sparsities = _numbers("--sparsity", config.sparsity, float)
    dense = load(config.model, dtype=config.dtype)
    models = {config.model: dense}
    for sparsity in sparsities:
        chosen = plan_of_widths(dense, sparsity, config.multiple_of)
        name = f"{config.model} at {chosen.sparsity:.1%}"
        models[name] = prune(twin(dense), chosen, compensate="none")
    return models, {config.model: config.model}


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "1,8" if kind is int else "0.2,0.5"
        raise InputError(f"{name}: got {text!r}; expected numbers such as {example}") from None


def _flat(row: Throughput, size: dict[str, Any]) -> dict[str, Any]:
    """A row's numbers under names that say their units."""
    low, high = row.tokens_interval
    slowest, fastest = row.speedup_interval
    return {
        "model": row.model,
        "parameters": size["parameters"],
        "bytes": size["bytes"],
        "peak_bytes": size["peak_bytes"],
        "batch": row.batch,
        "test": row.test,
        "tokens_per_s": row.tokens_per_s,
        "tokens_per_s_low": low,
        "tokens_per_s_high": high,
        "ttft_ms": 1e3 * row.latency_s if row.test.startswith("pp") else None,
        "tpot_ms": 1e3 * row.latency_s if row.test.startswith("tg") else None,
        "joules_per_token": row.joules_per_token,
        "speedup": row.speedup,
        "speedup_low": slowest,
        "speedup_high": fastest,
        "bound": None if row.bound is None else row.bound.speedup,
        "reached": None if row.bound is None else row.bound.reached,
    }


def print_rows(rows: list[Throughput], sizes: dict[str, dict], output: Output) -> None:
    """Print throughput rows as llama-bench does, the model's size and memory beside them."""
    table = [
        (
            row.model,
            count(sizes[row.model]["parameters"]),
            megabytes(sizes[row.model]["bytes"]),
            megabytes(sizes[row.model]["peak_bytes"]),
            row.batch,
            row.test,
            f"{row.tokens_per_s:.1f}",
            "{:.1f} – {:.1f}".format(*row.tokens_interval),
            f"{row.speedup:.2f} ×",
            "{:.2f} – {:.2f}".format(*row.speedup_interval),
            "–" if row.bound is None else f"{row.bound.speedup:.2f} ×",
            "–" if row.bound is None else f"{row.bound.reached:.0%}",
        )
        for row in rows
    ]
    columns = ("model", "params", "size", "peak", "batch", "test", "t/s", "95 %", "speed-up")
    output.table("throughput", (*columns, "95 %", "bound", "reached"), table)
