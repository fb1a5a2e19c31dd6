"""`prunekit bench`: throughput and memory, dense and pruned interleaved in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.checkpoint import save
from prunekit.cli import gate, widths
from prunekit.cli.output import Output
from prunekit.compact import compact_modules, prune
from prunekit.config import DTYPES, BenchConfig
from prunekit.errors import InputError
from prunekit.experiment.twin import plan_of_neurons, plan_of_widths, twin
from prunekit.files import check_output_file
from prunekit.integrations.fixed_shapes import Way
from prunekit.integrations.llamacpp import LlamaCpp, check_llamacpp
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.measure.comparison import Throughput, bench_models
from prunekit.measure.memory import model_bytes, parameter_count, peak_memory
from prunekit.measure.provenance import provenance
from prunekit.report.bench_table import Line, columns_and_cells, flat, how, sentences

CONFIG = BenchConfig
EXAMPLES = """  prunekit bench small --baseline demo
  prunekit bench demo --sparsity 0.2,0.35,0.5 --compact --report speed.html
  prunekit bench small --baseline demo --batch 1,8 --prompt 256 --generate 64
  prunekit bench small --baseline demo --dtype bf16,fp32 --format md
  prunekit bench small --baseline demo --compile
  prunekit bench small --baseline demo --llamacpp f16
  prunekit bench demo --widths
  prunekit bench small --json > small.json
  prunekit bench small --save baseline.json
  prunekit bench small --check baseline.json --max-regression 0.05"""


def run(config: BenchConfig, output: Output) -> int:
    """Measure every test of every model, and print a row each."""
    dtypes = _dtypes(config.dtype)
    gated = bool(config.save or config.check)
    if len(dtypes) > 1 and (gated or config.widths):
        raise InputError(f"--dtype: got {config.dtype}; --save, --check and --widths take one")
    if config.widths:
        return widths.run(config, output)
    batch = _numbers("--batch", config.batch, int)
    way = Way(config.compile, config.cuda_graph)
    way.check()
    if config.llamacpp:
        check_llamacpp()
    if config.report:
        check_output_file(config.report)
    if gated:
        gate.check_gate(config)
        models, _ = _models(config, config.dtype)
        return gate.run(config, _drop_in(models, config), batch, way, output)
    lines = [
        line
        for number, dtype in enumerate(dtypes)
        for line in _measured(config, dtype, batch, way, peers=number == 0)
    ]
    facts = provenance()
    if config.format == "table":
        output.table("throughput", *columns_and_cells(lines))
        output.line(how(facts, config.rounds))
        for sentence in sentences(lines):
            output.line(sentence)
    else:
        output.rows(config.format, [flat(line) for line in lines])
    if config.report:
        from prunekit.report.bench_page import write_bench_page

        page = write_bench_page(config.report, lines, facts, config.rounds)
        output.note(f"report: {page}")
    output.json({"rows": [asdict(line) for line in lines], "provenance": facts})
    return 0


def _measured(
    config: BenchConfig, dtype: str, batch: Sequence[int], way: Way, *, peers: bool
) -> list[Line]:
    """The rows of all models in one dtype, and with ``peers`` those of other engines."""
    models, folders = _models(config, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        sizes = _sizes(models, folders, dtype, config.prompt, Path(scratch))
        others = []
        if config.llamacpp and peers:
            tokenizers = {name: load_tokenizer(folders.get(name, config.model)) for name in models}
            exported = {name: (model, tokenizers[name]) for name, model in models.items()}
            length = config.prompt + config.generate
            others = [LlamaCpp(exported, Path(scratch), config.llamacpp, length)]
        rows = bench_models(
            _drop_in(models, config),
            prompt=config.prompt,
            generate=config.generate,
            batch=batch,
            rounds=config.rounds,
            explain=len(models) > 1,
            way=way,
            peers=others,
        )
        files = {
            (o.label, name): path.stat().st_size for o in others for name, path in o.files.items()
        }
    return [_line(row, sizes[row.model], files.get((row.engine, row.model))) for row in rows]


def _line(row: Throughput, size: dict[str, Any], file: int | None) -> Line:
    """With the size of an exported file, whose memory was not measured, where there is one."""
    return Line(row, **size | ({} if file is None else {"bytes": file, "peak_bytes": None}))


def _sizes(
    models: Mapping[str, nn.Module],
    folders: Mapping[str, str],
    dtype: str,
    prompt: int,
    scratch: Path,
) -> dict[str, dict[str, Any]]:
    found = {}
    for name, model in models.items():
        at = folders.get(name) or save(model, None, scratch / "model", force=True)
        peak = peak_memory(at, dtype=dtype, prompt=prompt)["peak_bytes"]
        size = {"parameters": parameter_count(model), "bytes": model_bytes(model)}
        found[name] = size | {"peak_bytes": peak}
    return found


def _drop_in(models: dict[str, nn.Module], config: BenchConfig) -> dict[str, nn.Module]:
    if not config.compact:
        return models
    return {name: compact_modules(model) for name, model in models.items()}


def _models(config: BenchConfig, dtype: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The models by name, the dense one first, and where those that were loaded lie."""
    if not config.sparsity and not config.neurons:
        names = [name for name in (config.baseline, config.model) if name]
        return {n: load(n, dtype=dtype) for n in names}, {n: n for n in names}
    if config.baseline:
        raise InputError("--sparsity, --neurons: MODEL is the dense one; leave --baseline out")
    sparsities = _numbers("--sparsity", config.sparsity, float) if config.sparsity else []
    counts = _numbers("--neurons", config.neurons, int) if config.neurons else []
    dense = load(config.model, dtype=dtype)
    plans = {}
    for sparsity in sparsities:
        chosen = plan_of_widths(dense, sparsity, config.multiple_of)
        plans[f"{config.model} at {chosen.sparsity:.1%}"] = chosen
    for count in counts:
        plans[f"{config.model}, {count} neurons"] = plan_of_neurons(dense, count)
    models = {n: prune(twin(dense), chosen, compensate="none") for n, chosen in plans.items()}
    return {config.model: dense, **models}, {config.model: config.model}


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "1,8" if kind is int else "0.2,0.5"
        raise InputError(f"{name}: got {text!r}; expected numbers such as {example}") from None


def _dtypes(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in DTYPES:
            raise InputError(f"--dtype: got {name!r}; expected some of {', '.join(DTYPES)}")
    return found
