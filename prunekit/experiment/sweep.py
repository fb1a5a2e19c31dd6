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

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.arch import find_mlps, fingerprint
from prunekit.calibrate import calibrate
from prunekit.compact import prune
from prunekit.criteria import score
from prunekit.criteria.auto import resolved
from prunekit.errors import InputError
from prunekit.evaluate import evaluate_loss
from prunekit.experiment.cells import DENSE, Cell, cells_of
from prunekit.experiment.ledger import NAME, Ledger
from prunekit.experiment.material import Material, corpus_of, problems_of, read_material
from prunekit.experiment.needs import gathered, solves, suffices
from prunekit.experiment.protocol import Protocol
from prunekit.experiment.speed import SPEED, measure_widths
from prunekit.experiment.trained import made_model, recovered
from prunekit.experiment.twin import twin
from prunekit.files import digest, read_json, write_json
from prunekit.integrations.loading import load_tokenizer
from prunekit.measure.memory import model_bytes, parameter_count
from prunekit.measure.provenance import provenance
from prunekit.plan import plan
from prunekit.stats import NeuronStats
from prunekit.tasks.run import evaluate_task

RUN, STATS, SCORES, PARTIAL = "run.json", "stats.safetensors", "scores.json", "partial"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SHOWN = 4  # generations that a row keeps


def sweep(
    protocol: Protocol,
    out: str | Path,
    *,
    resume: bool = False,
    allow_code_execution: bool = False,
    quiet: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run every cell of a protocol that has no row yet, and then measure speed.

    Args:
        protocol: what to do.
        out: the run's folder.
        resume: go on with a run that is there.
        allow_code_execution: for tasks that run what the model wrote.
        quiet: no progress bars.
        report: called with every row as it is done.

    Returns:
        One row a cell, in the protocol's order.

    Raises:
        InputError: something named in the protocol cannot be read, the folder has results and
            ``resume`` is not set, is another's, or what they were made from differs.

    Cost:
        One calibration; each cell its own pruning, forwards and generations. The dense model, and
        a pruned one that shares all but its MLPs with it.
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
            study = _Study(protocol, out, tokenizer, material, quiet)
            for cell in missing:
                key = cell.key(facts)
                row = {"key": key, "cell": asdict(cell), **study.run(cell, key)}
                ledger.append(row)
                study.forget_partial()
                done[key] = row
                if report is not None:
                    report(row)
            if measures:
                measure_widths(study.model, tokenizer, protocol, cells, out)
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


class _Study:
    """The loaded model, its calibration, and what several cells share."""

    def __init__(self, protocol: Protocol, out: Path, tokenizer, material: Material, quiet: bool):
        self.protocol, self.out, self.tokenizer = protocol, out, tokenizer
        self.material, self.quiet = material, quiet
        self.model = made_model(protocol, tokenizer, quiet=quiet)
        self.fingerprint = fingerprint(find_mlps(self.model, verify=False))
        self.scores: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.last: tuple[Cell, nn.Module] | None = None

    @cached_property
    def stats(self) -> NeuronStats | None:
        """The statistics that all cells need, from the run's folder where they are there."""
        wanted = gathered(self.protocol)
        if wanted is None:
            return None
        path = self.out / STATS
        if path.is_file() and suffices(stats := NeuronStats.load(path), wanted):
            return stats
        stats = calibrate(
            self.model,
            self.tokenizer,
            self.material.target,
            self.material.distractors,
            **wanted,
            max_length=self.protocol.max_length,
            batch_tokens=self.protocol.batch_tokens,
            quiet=self.quiet,
        )
        stats.save(path)
        return stats

    def run(self, cell: Cell, key: str) -> dict[str, Any]:
        """Make the model of a cell and measure it; an InputError becomes the row's error."""
        begun = time.perf_counter()
        seconds = {"prune": 0.0, "recover": 0.0, "evaluate": 0.0}
        try:
            model = self._pruned(cell)
            seconds["prune"] = time.perf_counter() - begun
            if cell.recovery:
                begun = time.perf_counter()
                model = self._recovered(model)
                seconds["recover"] = time.perf_counter() - begun
            begun = time.perf_counter()
            found = self._measured(model, cell, key)
        except InputError as error:
            return {"error": str(error)}
        seconds["evaluate"] = time.perf_counter() - begun
        return found | {"seconds": seconds, "error": ""}

    def _pruned(self, cell: Cell) -> nn.Module:
        if cell.strategy == DENSE:
            return self.model
        if self.last is not None and self.last[0] == cell.pruned:
            return self.last[1]
        chosen = plan(
            self._scores(cell),
            cell.sparsity,
            strategy=cell.strategy,
            multiple_of=self.protocol.multiple_of,
            seed=cell.seed,
            recipe={"criterion": self._criterion(cell), "fingerprint": self.fingerprint},
        )
        model = prune(twin(self.model), chosen, stats=self.stats, compensate=cell.compensate)
        self.last = cell.pruned, model
        return model

    def _recovered(self, model: nn.Module) -> nn.Module:
        given = model, self.tokenizer, self.protocol, self.material, self.model
        return recovered(*given, quiet=self.quiet)

    def _criterion(self, cell: Cell) -> str:
        return resolved(cell.criterion, self.stats, repaired=solves(cell))

    def _scores(self, cell: Cell) -> list[torch.Tensor]:
        """Scores, once a criterion and seed, and a word of them in the run's folder."""
        way = self._criterion(cell), cell.seed if cell.criterion == "random" else 0
        if way not in self.scores:
            self.scores[way] = score(self.stats, self.model, way[0], seed=way[1])
            if way[0] != "random":
                path = self.out / SCORES
                known = read_json(path) if path.is_file() else {"quantiles": QUANTILES}
                write_json(path, known | {way[0]: _quantiles(self.scores[way])})
        return self.scores[way]

    def _measured(self, model: nn.Module, cell: Cell, key: str) -> dict[str, Any]:
        views = find_mlps(model, verify=False)
        widths = [view.width for view in views]
        dense = [view.width for view in find_mlps(self.model, verify=False)]
        return {
            "criterion": self._criterion(cell) if cell.criterion else "",
            "sparsity": 1 - sum(widths) / sum(dense),
            "widths": widths,
            "parameters": parameter_count(model),
            "bytes": model_bytes(model),
            "losses": {name: self._loss(model, c) for name, c in self.material.losses.items()},
            "tasks": {
                task.name: self._solved(model, f"{key}-{i}", task, tokens)
                for i, (task, tokens) in enumerate(self.material.tasks)
            },
        }

    def _loss(self, model: nn.Module, corpus) -> dict[str, Any] | None:
        try:
            found = evaluate_loss(
                model, self.tokenizer, corpus, max_length=self.protocol.max_length, quiet=self.quiet
            )
        except InputError:  # not finite: the model is destroyed, which is a result too
            return None
        facts = found.as_dict()
        return {name: facts[name] for name in ("loss", "stderr", "tokens", "prompts")}

    def _solved(self, model: nn.Module, name: str, task, tokens: int | None) -> dict[str, Any]:
        folder = self.out / PARTIAL
        folder.mkdir(exist_ok=True)
        result = evaluate_task(
            model,
            self.tokenizer,
            task,
            batch_size=self.protocol.batch_size,
            max_new_tokens=tokens,
            resume=folder / f"{name}.jsonl",
            quiet=self.quiet,
        )
        if not result.correct:
            raise InputError(f"task {task.name}: its answers are not right or wrong; take another")
        answers = zip(problems_of(task), result.generations, strict=True)
        return {
            "accuracy": result.accuracy,
            "stderr": result.stderr if len(result.correct) > 1 else None,
            "correct": [int(c) for c in result.correct],
            "failures": dict(result.failures),
            "generations": [_generation(task, *each) for each in islice(answers, _SHOWN)],
        }

    def forget_partial(self) -> None:
        """Drop what tasks kept of their answers: the row has them now."""
        for path in (self.out / PARTIAL).glob("*"):
            path.unlink()
        if (self.out / PARTIAL).is_dir():
            (self.out / PARTIAL).rmdir()


def _quantiles(scores: list[torch.Tensor]) -> list[list[float]]:
    at = torch.tensor(QUANTILES)
    return [[float(f"{q:.6g}") for q in torch.quantile(each, at)] for each in scores]


def _generation(task: Any, problem: Any, generation: Any) -> dict[str, Any]:
    grade = task.grade(problem, generation.text, ended=generation.ended)
    facts = {"text": generation.text, "correct": grade.correct, "failure": grade.failure}
    return {"prompt": problem.prompt, **facts}
