"""Any task of EleutherAI's lm-evaluation-harness, run by it on our model."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.errors import InputError
from prunekit.tasks.base import Metric, TaskResult


@dataclass(frozen=True)
class LmEvalTask:
    """A task that lm-eval prompts, runs and scores by itself: it has no problems to show.

    Attributes:
        name: as reports call it.
        task: lm-eval's name of it.
        manager: lm-eval's TaskManager, which knows it.
        limit: the first so many problems; 0: all.
        allow_code_execution: it may run what the model writes, which lm-eval does unconfined.
    """

    name: str
    task: str
    manager: Any
    limit: int = 0
    allow_code_execution: bool = False

    def evaluate(self, model: nn.Module, tokenizer: Any, *, batch_size: int) -> TaskResult:
        """Run the task; `TaskResult.correct` is empty where its first metric is not right or wrong.

        Raises:
            InputError: lm-eval cannot run it; often its data cannot be fetched.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=[self.task],
                task_manager=self.manager,
                limit=self.limit or None,
                confirm_run_unsafe_code=self.allow_code_execution,
            )
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.name}: lm-eval cannot run it: {reason}") from error
        metrics = tuple(
            Metric(task, found["n-shot"].get(task, 0), metric, value, stderr)
            for task, row in found["results"].items()
            for metric, value, stderr in _metrics(row)
        )
        correct = _correct(found["samples"])
        wrong = len(correct) - sum(correct)
        failures = {"wrong": wrong} if wrong else {}
        return TaskResult(self.name, metrics[0].name, correct, failures, (), metrics)


def lm_eval(name: str, *, limit: int = 0, allow_code_execution: bool = False) -> LmEvalTask:
    """One of lm-eval's tasks.

    Args:
        name: lm-eval's name, such as ``arc_easy``, or a file NAME.yaml that describes task NAME.
        limit: the first so many problems; 0: all.
        allow_code_execution: let it run what the model writes; lm-eval does so unconfined.

    Raises:
        InputError: the package lm-eval is not installed, or knows no such task.

    Source:
        https://github.com/EleutherAI/lm-evaluation-harness
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError(
            f"lm-eval:{name}: lm-eval is not installed; pip install 'prunekit[lm-eval]'"
        ) from None
    path = Path(name)
    own = path.suffix == ".yaml" and path.is_file()
    manager = TaskManager(include_path=str(path.parent) if own else None)
    task = path.stem if own else name
    if task not in manager.all_tasks:
        raise InputError(f"lm-eval:{name}: lm-eval knows no such task; `lm-eval ls tasks` does")
    return LmEvalTask(f"lm-eval:{task}", task, manager, limit, allow_code_execution)


def _metrics(row: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Name, value and standard error of each metric of a row of lm-eval's results."""
    found = []
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
            continue
        stderr = row.get(f"{metric}_stderr,{chosen}")
        error = float(stderr) if isinstance(stderr, numbers.Real) else None
        found.append((metric if chosen == "none" else key, float(value), error))
    return found


def _correct(samples: dict[str, list[dict[str, Any]]]) -> tuple[bool, ...]:
    """The first metric by problem, under its first filter, where it is 0 or 1."""
    values = []
    for rows in samples.values():
        first = [row for row in rows if row["filter"] == rows[0]["filter"]]
        ordered = sorted(first, key=lambda row: row["doc_id"])
        values += [row[rows[0]["metrics"][0]] for row in ordered]
    right_or_wrong = all(isinstance(v, numbers.Real) and v in (0, 1) for v in values)
    return tuple(bool(value) for value in values) if right_or_wrong else ()
