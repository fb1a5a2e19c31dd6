"""`prunekit bench`: throughput and memory, dense and pruned interleaved in one run."""

from __future__ import annotations

from dataclasses import asdict

from prunekit.cli.output import Output, count, megabytes
from prunekit.compact import compact_modules
from prunekit.config import BenchConfig
from prunekit.errors import InputError
from prunekit.integrations.loading import load
from prunekit.measure.comparison import Throughput, bench_models
from prunekit.measure.memory import model_bytes, parameter_count, peak_memory
from prunekit.measure.provenance import provenance

CONFIG = BenchConfig
EXAMPLES = """  prunekit bench small --baseline demo
  prunekit bench small --baseline demo --batch 1,8 --prompt 256 --generate 64
  prunekit bench small --json > small.json"""


def run(config: BenchConfig, output: Output) -> int:
    """Measure every test of every model, and print a row each."""
    batch = _batches(config.batch)
    names = [config.baseline, config.model] if config.baseline else [config.model]
    models = {name: load(name, dtype=config.dtype) for name in dict.fromkeys(names)}
    if config.compact:
        models = {name: compact_modules(model) for name, model in models.items()}
    rows = bench_models(
        models,
        prompt=config.prompt,
        generate=config.generate,
        batch=batch,
        rounds=config.rounds,
    )
    sizes = {}
    for name, model in models.items():
        peak = peak_memory(name, dtype=config.dtype, prompt=config.prompt)
        sizes[name] = {"parameters": parameter_count(model), "bytes": model_bytes(model)} | peak
    print_rows(rows, sizes, output)
    facts = provenance()
    output.line(
        f"{facts['device']}; torch {facts['versions']['torch']}; median of {config.rounds} "
        "interleaved rounds with quartiles; peak: what loading and running added to a fresh process"
    )
    output.json({"rows": [asdict(row) for row in rows], "models": sizes, "provenance": facts})
    return 0


def _batches(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--batch: got {text!r}; expected numbers such as 1,8") from None


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
            f"{row.low:.1f} – {row.high:.1f}",
            f"{row.speedup:.2f} ×",
        )
        for row in rows
    ]
    columns = ("model", "params", "size", "peak", "batch", "test", "t/s", "quartiles", "speed-up")
    output.table("throughput", columns, table)
