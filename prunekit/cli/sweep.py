"""`prunekit sweep`: a whole study in one command, from a protocol."""

from __future__ import annotations

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prunekit.cli.forecast import duration, gigabytes
from prunekit.cli.output import Output
from prunekit.config import SweepConfig
from prunekit.course import Stopped
from prunekit.errors import InputError
from prunekit.experiment.analysis import Way, read_run
from prunekit.experiment.cells import DENSE, Cell, cells_of
from prunekit.experiment.claims import claims
from prunekit.experiment.forecast import SweepForecast, predict_sweep
from prunekit.experiment.ledger import NAME
from prunekit.experiment.protocol import Protocol, read_protocol
from prunekit.experiment.sweep import sweep
from prunekit.files import check_output_file
from prunekit.integrations.loading import load_shape
from prunekit.measure.cost import Shape, measure_rates
from prunekit.measure.provenance import device_name

CONFIG = SweepConfig
EXAMPLES = """  prunekit sweep mini-math
  prunekit sweep mini-math --resume
  prunekit sweep my-study.yaml --ray auto --workers 4
  prunekit sweep paper-math-1.5b --dry-run
  prunekit sweep my-study.yaml --model my-model --out runs/mine"""


def run(config: SweepConfig, output: Output) -> int:
    """Run a protocol, a line a cell, and say what is true; 1 where a cell has no result."""
    protocol = read_protocol(config.protocol, model=config.model)
    if config.workers < 0 or (config.workers and not config.ray):
        raise InputError(f"--workers: got {config.workers}; expected 1 or more, and --ray with it")
    if config.dry_run:
        return _dry_run(protocol, output)
    out = Path(config.out or protocol.name)
    check_output_file(out / NAME)
    cells, done = cells_of(protocol), []

    def report(row: dict[str, Any]) -> None:
        done.append(row)
        if not config.quiet:
            number = cells.index(Cell(**row["cell"])) + 1
            output.note(f"{number}/{len(cells)} {_named(row['cell'])}: {_figures(row)}")

    options = {"allow_code_execution": config.allow_code_execution, "quiet": config.quiet}
    options |= {"ray": config.ray, "workers": config.workers}
    try:
        rows = sweep(protocol, out, resume=config.resume, report=report, **options)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, f"{len(done)} cells were run now and are kept") from None
    failed = [row for row in rows if row["error"]]
    output.table(
        f"{protocol.name}: {len(cells)} cells, {len(done)} of them run now",
        ("model", "removed", *_measured(rows)),
        [_row(row, _measured(rows)) for row in rows],
    )
    found = [] if rows[0]["error"] else claims(read_run(out))
    for claim in found:
        output.line(f"{claim.title}: {claim.verdict} {claim.subject and f'({claim.subject})'}")
    output.line(f"\nresults: {out / NAME}\nreport:  prunekit report {out} -o report.html")
    output.json({"out": str(out), "rows": rows, "claims": [asdict(claim) for claim in found]})
    return 1 if failed else 0


def _named(cell: dict[str, Any]) -> str:
    if cell["strategy"] == DENSE:
        return DENSE
    way = Way(cell["strategy"], cell["criterion"], cell["compensate"], cell["recovery"])
    seed = f", seed {cell['seed']}" if cell["criterion"] == "random" else ""
    return f"{way.label}, {cell['sparsity']:.1%}{seed}"


def _figures(row: dict[str, Any]) -> str:
    if row["error"]:
        return row["error"]
    found = [f"{task} {facts['accuracy']:.3f}" for task, facts in row["tasks"].items()]
    found += [f"loss on {name} {_loss(facts)}" for name, facts in row["losses"].items()]
    return f"{', '.join(found)} ({duration(sum(row['seconds'].values()))})"


def _loss(facts: dict[str, Any] | None) -> str:
    return "not finite" if facts is None else f"{facts['loss']:.3f}"


def _measured(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The columns of a table: tasks, then losses."""
    whole = next((row for row in rows if not row["error"]), {"tasks": {}, "losses": {}})
    return (*whole["tasks"], *(f"loss {name}" for name in whole["losses"]))


def _row(row: dict[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    if row["error"]:
        return (_named(row["cell"]), "", *([row["error"]] + [""] * len(columns))[: len(columns)])
    values = [f"{f['accuracy']:.3f} ± {f['stderr'] or 0:.3f}" for f in row["tasks"].values()]
    values += [_loss(facts) for facts in row["losses"].values()]
    return (_named(row["cell"]), f"{row['sparsity']:.1%}", *values)


def _dry_run(protocol: Protocol, output: Output) -> int:
    model = load_shape(protocol.model, dtype=protocol.dtype)
    shape = Shape.of(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = model.get_input_embeddings().weight
    found = predict_sweep(protocol, shape, measure_rates(shape, weight.dtype, device))
    rows = [
        (
            _named(asdict(each.cell)),
            f"{each.sparsity:.2%}",
            each.widths[0],
            gigabytes(each.bytes),
            duration(each.prune),
            duration(each.losses),
            duration(each.answers),
            duration(each.recover),
        )
        for each in found.cells
    ]
    columns = ("cell", "removed", "width", "weights", "prune", "losses", "answers", "recover")
    title = f"{protocol.name}: {len(rows)} cells of {protocol.model}; nothing run (--dry-run)"
    output.table(title, columns, rows)
    _summary(found, output)
    output.json({"protocol": protocol.as_dict(), "device": device_name(), **_facts(found)})
    return 0


def _summary(found: SweepForecast, output: Output) -> None:
    before = ", ".join(f"{p.name} {duration(p.seconds)}" for p in found.before) or "nothing"
    output.line(
        f"before the cells: {before}; speed and memory: {duration(found.measuring)}\n"
        f"predicted at most {duration(found.seconds)} in all, every answer taken to reach its "
        f"limit; peak memory {gigabytes(found.peak_bytes)}, disk {gigabytes(found.disk_bytes)}\n"
        f"from rates measured now on {device_name()}"
    )


def _facts(found: SweepForecast) -> dict[str, Any]:
    cells = [asdict(each) | {"seconds": each.seconds} for each in found.cells]
    totals = ("seconds", "measuring", "peak_bytes", "disk_bytes")
    return {
        "cells": cells,
        "before": [asdict(phase) for phase in found.before],
        **{name: getattr(found, name) for name in totals},
    }
