"""A sweep's study: the loaded model, its calibration, and what each cell measures of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
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
from prunekit.experiment.cells import DENSE, Cell
from prunekit.experiment.material import Material, problems_of, read_material
from prunekit.experiment.needs import gathered, solves, suffices
from prunekit.experiment.protocol import Protocol
from prunekit.experiment.speed import measure_widths
from prunekit.experiment.trained import made_model, recovered
from prunekit.experiment.twin import twin
from prunekit.files import read_json, write_json
from prunekit.integrations.loading import load_tokenizer
from prunekit.measure.memory import model_bytes, parameter_count
from prunekit.plan import plan
from prunekit.stats import NeuronStats
from prunekit.tasks.run import evaluate_task

STATS, SCORES, PARTIAL = "stats.safetensors", "scores.json", "partial"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SHOWN = 4  # generations that a row keeps


class Study:
    """The loaded model, its calibration, and what several cells share.

    Args:
        protocol: what is studied.
        out: the run's folder, which keeps the calibration, the scores and unfinished answers.
        tokenizer, material: as `read_material` takes and returns them.
        quiet: no progress bars.
    """

    def __init__(
        self, protocol: Protocol, out: Path, tokenizer: Any, material: Material, *, quiet: bool
    ):
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

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Calibrate, unless that was done, and write down quantiles of every cell's scores."""
        for cell in cells:
            if cell.strategy != DENSE:
                with suppress(InputError):  # the cell's own row will say it
                    self._scores(cell)
        path = self.out / SCORES
        known = read_json(path) if path.is_file() else {"quantiles": QUANTILES}
        found = {name: _quantiles(each) for (name, _), each in self.scores.items()}
        found.pop("random", None)
        if found:
            write_json(path, known | found)

    def measure(self, cells: Sequence[Cell]) -> None:
        """Time every width, as `measure_widths` does."""
        measure_widths(self.model, self.tokenizer, self.protocol, cells, self.out)

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
        """Scores, once a criterion and seed."""
        way = self._criterion(cell), cell.seed if cell.criterion == "random" else 0
        if way not in self.scores:
            self.scores[way] = score(self.stats, self.model, way[0], seed=way[1])
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


def open_study(
    protocol: Protocol, out: Path, *, allow_code_execution: bool = False, quiet: bool = True
) -> Study:
    """Read all that a study needs, and load its model.

    Raises:
        InputError: as `read_material` and `load` raise it.
    """
    tokenizer = load_tokenizer(protocol.model)
    material = read_material(protocol, tokenizer, allow_code_execution=allow_code_execution)
    return Study(protocol, out, tokenizer, material, quiet=quiet)


def forget_partial(out: Path, key: str) -> None:
    """Drop what tasks kept of a cell's answers: its row has them now."""
    for path in (out / PARTIAL).glob(f"{key}-*"):
        path.unlink()
    if (out / PARTIAL).is_dir() and not any((out / PARTIAL).iterdir()):
        (out / PARTIAL).rmdir()


def _quantiles(scores: list[torch.Tensor]) -> list[list[float]]:
    at = torch.tensor(QUANTILES)
    return [[float(f"{q:.6g}") for q in torch.quantile(each, at)] for each in scores]


def _generation(task: Any, problem: Any, generation: Any) -> dict[str, Any]:
    grade = task.grade(problem, generation.text, ended=generation.ended)
    facts = {"text": generation.text, "correct": grade.correct, "failure": grade.failure}
    return {"prompt": problem.prompt, **facts}
