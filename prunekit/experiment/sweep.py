"""Sweeps: every cell of a protocol, from one calibration and one loaded model.

RUN/results.jsonl has a row a cell:

    key          hash of what the row depends on: the study's facts, and the cell
    cell         strategy, sparsity (asked for), criterion, compensate, seed, recovery
    criterion    the one that `auto` stood for
    sparsity     the fraction of neurons really removed
    widths       F' of each MLP
    parameters, bytes    of the model, tied ones once
    losses       by corpus: loss, stderr (nats a token), tokens, prompts; null where not finite
    tasks        by task: accuracy, stderr, correct (0 or 1 a problem, in order), failures (number
                 by kind), generations (the first few: prompt, text, correct, failure)
    seconds      to prune, to recover, to evaluate
    error        why there is nothing but the cell, or ""

RUN/run.json has the protocol, the facts and where it ran; RUN/stats.safetensors the calibration;
RUN/scores.json the quantiles of every criterion's scores by MLP; RUN/speed.json speed and memory
by width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from prunekit.errors import InputError
from prunekit.experiment.cells import Cell, cells_of
from prunekit.experiment.ledger import NAME, Ledger
from prunekit.experiment.material import Material, corpus_of, read_material
from prunekit.experiment.protocol import Protocol
from prunekit.experiment.speed import SPEED
from prunekit.experiment.study import Study, forget_partial, open_study
from prunekit.files import digest, read_json, write_json
from prunekit.integrations.loading import load_tokenizer
from prunekit.integrations.ray_pool import RayPool
from prunekit.measure.provenance import provenance

RUN = "run.json"


def sweep(
    protocol: Protocol,
    out: str | Path,
    *,
    resume: bool = False,
    allow_code_execution: bool = False,
    quiet: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    ray: str = "",
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Run every cell of a protocol that has no row yet, and then measure speed.

    Args:
        protocol: what to do.
        out: the run's folder.
        resume: go on with a run that is there.
        allow_code_execution: for tasks that run what the model wrote.
        quiet: no progress bars.
        report: called with every row as it is done.
        ray: a Ray cluster to share the cells out over, and workers: in how many processes, as for
            `RayPool`. A worker that dies is replaced, and does its cell again; the file system
            must be one that all machines see. Without ray everything runs in this process.

    Returns:
        One row a cell, in the protocol's order.

    Raises:
        InputError: something named in the protocol cannot be read, the folder has results and
            ``resume`` is not set, is another's, or what they were made from differs; a worker dies
            of the same cell again and again.

    Cost:
        One calibration; each cell its own pruning, forwards and generations. The dense model, and
        a pruned one that shares all but its MLPs with it; with ray, a worker.
    """
    out = Path(out)
    if (out / NAME).is_file() and (out / NAME).stat().st_size and not resume:
        raise InputError(f"{out}: has results; pass --resume to go on, or another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / NAME).is_file():
        raise InputError(f"{out}: is not empty and no run; name another --out")
    tokenizer = load_tokenizer(protocol.model)
    material = read_material(protocol, tokenizer, allow_code_execution=allow_code_execution)
    facts = facts_of(protocol, material, tokenizer)
    cells = cells_of(protocol)
    with Ledger(out) as ledger:
        _begin(out, protocol, facts, [cell.key(facts) for cell in cells])
        done = {row["key"]: row for row in ledger.rows}
        missing = [cell for cell in cells if cell.key(facts) not in done]
        measures = protocol.measure.speed or protocol.measure.memory
        if missing or (measures and not (out / SPEED).is_file()):
            if ray:
                options = {"allow_code_execution": allow_code_execution}
                opened = RayPool(partial(open_study, protocol, out, **options), ray, workers)
            else:
                opened = nullcontext(_Here(protocol, out, tokenizer, material, quiet=quiet))
            with opened as pool:
                pool.one("prepare", missing)
                calls = [[(cell, cell.key(facts)) for cell in group] for group in _alike(missing)]
                for (cell, key), found in pool.each("run", calls):
                    row = {"key": key, "cell": asdict(cell), **found}
                    ledger.append(row)
                    forget_partial(out, key)
                    done[key] = row
                    if report is not None:
                        report(row)
                if measures:
                    pool.one("measure", cells)
    return [done[cell.key(facts)] for cell in cells]


def facts_of(protocol: Protocol, material: Material, tokenizer: Any) -> dict[str, Any]:
    """What every row depends on, beside its cell."""
    trained = {}
    for name in ("make", "recovery"):
        training = getattr(protocol, name)
        trained[name] = training and {
            "settings": asdict(training.settings()),
            "corpus": training.corpus and corpus_of(training.corpus, tokenizer).hash,
        }
    options = ("model", "dtype", "held_out", "multiple_of", "max_length")
    options += ("batch_tokens", "batch_size")  # sums of other batches round otherwise
    facts = {name: getattr(protocol, name) for name in options} | trained | material.facts()
    facts["tasks"] = [digest(task) for task in facts["tasks"]]
    return facts


def _begin(out: Path, protocol: Protocol, facts: dict[str, Any], keys: list[str]) -> None:
    """Record what is run, or check that it is what was begun."""
    runs = []
    if (out / RUN).is_file():
        before = read_json(out / RUN)
        runs = before["runs"]
        changed = [name for name in facts if before["facts"].get(name) != facts[name]]
        if changed:
            raise InputError(
                f"{out}: was begun with another {changed[0]}; take another --out, or undo that"
            )
    value = {"protocol": protocol.as_dict(), "facts": facts, "keys": keys}
    write_json(out / RUN, value | {"runs": [*runs, provenance()]})


def _alike(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Cells in turn, those together that one pruning serves."""
    for _, group in groupby(cells, key=lambda cell: cell.pruned):
        yield list(group)


class _Here(Study):
    """The study in this process, called as those of a `RayPool` are."""

    def one(self, call: str, *given: Any) -> Any:
        return getattr(self, call)(*given)

    def each(self, call: str, groups: Sequence[Sequence[tuple]]) -> Iterator[tuple[tuple, Any]]:
        for group in groups:
            for given in group:
                yield given, self.one(call, *given)
