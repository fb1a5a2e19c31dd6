"""Speed and memory of a sweep's models: they depend on the widths alone, so once a width."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.arch import find_mlps
from prunekit.checkpoint import save, weight_bytes
from prunekit.compact import prune
from prunekit.experiment.cells import Cell
from prunekit.experiment.protocol import Protocol
from prunekit.experiment.twin import twin
from prunekit.files import write_json
from prunekit.measure.comparison import bench_models
from prunekit.measure.memory import peak_memory
from prunekit.plan import plan

SPEED = "speed.json"
_AT_ONCE = 4  # models beside the dense one in memory


def measure_widths(
    model: nn.Module, tokenizer: Any, protocol: Protocol, cells: Sequence[Cell], out: Path
) -> None:
    """Time every width of a sweep in turn with the dense model, and write RUN/speed.json.

    The file has, by width of the first MLP: sparsity, and where they are measured pp and tg
    (tokens_per_s, low, high, speedup; batch 1), memory (peak_bytes, kind) and disk (bytes).

    Cost:
        rounds + 1 prefills and decodes a width, and as many of the dense model a few widths; for
        the memory, a folder written and a process started a width.
    """
    views = find_mlps(model, verify=False)
    zeros = [torch.zeros(view.width) for view in views]
    dense = views[0].width
    found: dict[str, dict[str, Any]] = {str(dense): {"sparsity": 0.0}}
    plans = {}
    for sparsity in sorted({cell.sparsity for cell in cells if cell.sparsity}):
        chosen = plan(zeros, sparsity, multiple_of=protocol.multiple_of)
        if chosen.sparsity > 0:
            plans.setdefault(str(chosen.widths()[0]), chosen)
    widths = list(plans)
    for start in range(0, max(len(widths), 1), _AT_ONCE):
        models = {str(dense): model}
        for width in widths[start : start + _AT_ONCE]:
            found[width] = {"sparsity": plans[width].sparsity}
            models[width] = prune(twin(model), plans[width], compensate="none")
        if protocol.measure.speed:
            for row in _timed(models, protocol):
                kept = {k: row[k] for k in ("tokens_per_s", "low", "high", "speedup")}
                found[row["model"]].setdefault(row["test"][:2], kept)
        if protocol.measure.memory:
            for width, each in models.items():
                if "memory" not in found[width]:
                    found[width] |= _memory(each, tokenizer, protocol, out)
    write_json(out / SPEED, {"measure": asdict(protocol.measure), "widths": found})


def _timed(models: dict[str, nn.Module], protocol: Protocol) -> list[dict[str, Any]]:
    m = protocol.measure
    rows = bench_models(models, prompt=m.prompt, generate=m.generate, rounds=m.rounds)
    return [asdict(row) for row in rows]


def _memory(model: nn.Module, tokenizer: Any, protocol: Protocol, out: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folder = save(model, tokenizer, Path(scratch) / "model")
        peak = peak_memory(folder, prompt=protocol.measure.prompt)
        return {"memory": peak, "disk": weight_bytes(folder)}
