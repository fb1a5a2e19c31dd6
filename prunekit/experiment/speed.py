"""Speed and memory of a sweep's models: they depend on the widths alone, so once a width."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from prunekit.arch import find_mlps
from prunekit.checkpoint import save, weight_bytes
from prunekit.compact import prune
from prunekit.experiment.cells import Cell
from prunekit.experiment.protocol import Protocol
from prunekit.experiment.twin import plan_of_widths, twin
from prunekit.files import write_json
from prunekit.measure.comparison import bench_models
from prunekit.measure.memory import peak_memory
from prunekit.plan import PrunePlan

SPEED = "speed.json"
_SHARE = 0.5  # of the free memory that the models beside the dense one may take together


def measure_widths(
    model: nn.Module, tokenizer: Any, protocol: Protocol, cells: Sequence[Cell], out: Path
) -> None:
    """Time every width of a sweep in turn with the dense model, and write RUN/speed.json.

    The file has, by width of the first MLP: sparsity, and where they are measured pp and tg
    (tokens_per_s, low, high, speedup; batch 1), memory (peak_bytes, kind) and disk (bytes). Where
    not all models fit into memory at once they are timed in groups, the dense model in each, and
    the rates of later groups are scaled so that the dense model's is that of the first.

    Cost:
        rounds + 1 prefills and decodes a width, and as many of the dense model a group; for the
        memory, a folder written and a process started a width.
    """
    views = find_mlps(model, verify=False)
    dense = str(views[0].width)
    plans: dict[str, PrunePlan] = {}
    for sparsity in sorted({cell.sparsity for cell in cells if cell.sparsity}):
        chosen = plan_of_widths(model, sparsity, protocol.multiple_of)
        if chosen.sparsity > 0:
            plans.setdefault(str(chosen.widths()[0]), chosen)
    found: dict[str, dict[str, Any]] = {dense: {"sparsity": 0.0}}
    found |= {width: {"sparsity": chosen.sparsity} for width, chosen in plans.items()}
    for widths in _groups(model, plans):
        pruned = {w: prune(twin(model), plans[w], compensate="none") for w in widths}
        models = {dense: model, **pruned}
        if protocol.measure.speed:
            _add_rates(found, dense, _timed(models, protocol))
        if protocol.measure.memory:
            for width, each in models.items():
                if "memory" not in found[width]:
                    found[width] |= _memory(each, tokenizer, protocol, out)
    write_json(out / SPEED, {"measure": asdict(protocol.measure), "widths": found})


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _groups(model: nn.Module, plans: dict[str, PrunePlan]) -> list[list[str]]:
    """The widths, in groups whose MLPs fit into a share of the free memory; at least one."""
    views = find_mlps(model, verify=False)
    budget, groups, held = _SHARE * _free_bytes(), [[]], 0.0
    parts = [(slot.read(view.width) for slot in view.slots.values()) for view in views]
    size = sum(part.numel() * part.element_size() for many in parts for part in many)
    for width, chosen in plans.items():
        needed = size * (1 - chosen.sparsity)
        if groups[-1] and held + needed > budget:
            groups.append([])
            held = 0.0
        groups[-1].append(width)
        held += needed
    return groups


def _add_rates(found: dict[str, dict[str, Any]], dense: str, rows: list[dict[str, Any]]) -> None:
    """Add a group's rates, on the clock of the first group's dense model."""
    now = {row["test"][:2]: row["tokens_per_s"] for row in rows if row["model"] == dense}
    for row in rows:
        test = row["test"][:2]
        first = found[dense].get(test, {"tokens_per_s": now[test]})["tokens_per_s"]
        rates = {k: row[k] * first / now[test] for k in ("tokens_per_s", "low", "high")}
        found[row["model"]].setdefault(test, rates | {"speedup": row["speedup"]})


def _timed(models: dict[str, nn.Module], protocol: Protocol) -> list[dict[str, Any]]:
    m = protocol.measure
    rows = bench_models(models, prompt=m.prompt, generate=m.generate, rounds=m.rounds)
    return [asdict(row) for row in rows]


def _memory(model: nn.Module, tokenizer: Any, protocol: Protocol, out: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folder = save(model, tokenizer, Path(scratch) / "model")
        peak = peak_memory(folder, prompt=protocol.measure.prompt)
        return {"memory": peak, "disk": weight_bytes(folder)}
