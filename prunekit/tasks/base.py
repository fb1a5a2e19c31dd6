"""What a task is: problems to be continued, and a judge of the continuations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from prunekit.errors import InputError
from prunekit.tasks.failures import FAILURES, failure_kind


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: names it within its task.
        prompt: what the model is to continue.
        answer: what grading compares with: a number, a text, or a program that tests.
    """

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Grade:
    """Whether a continuation solves its problem, and if not, how it fails (`failures`)."""

    correct: bool
    failure: str = ""


# (problem, text, ended): True or False; None where the text holds no answer to compare.
Check = Callable[[Problem, str, bool], "bool | None"]


@dataclass(frozen=True)
class Task:
    """Problems, how to continue them, and how to judge what came.

    Attributes:
        name: as reports call it.
        problems: in the order of the results.
        check: (problem, text, ended) -> True, False, or None where the text holds no answer.
        stop: texts that end a continuation; they are cut off.
        max_new_tokens: the limit at which a continuation that has not ended is a trap.
        metric: the name of the share that is correct.
        chat: put prompts through the tokenizer's chat template, where it has one.
    """

    name: str
    problems: tuple[Problem, ...]
    check: Check = field(repr=False)
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    metric: str = "exact_match"
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.problems:
            raise InputError(f"task {self.name}: has no problem")
        if len({problem.id for problem in self.problems}) != len(self.problems):
            raise InputError(f"task {self.name}: two problems have one id")

    def grade(self, problem: Problem, text: str, *, ended: bool) -> Grade:
        """Judge one continuation.

        Args:
            problem: the problem that was continued.
            text: the continuation, without prompt and stop text.
            ended: whether it ended by itself, before the limit of new tokens.
        """
        verdict = self.check(problem, text, ended)
        if verdict:
            return Grade(True)
        return Grade(False, failure_kind(text, ended=ended, parsed=verdict is not None))


@dataclass(frozen=True)
class Generation:
    """One continuation: its text up to the stop, its tokens, and whether it ended by itself."""

    id: str
    text: str
    ended: bool
    tokens: int


@dataclass(frozen=True)
class Metric:
    """A row of a table of results, as lm-eval prints it; the standard error may be unknown."""

    task: str
    n_shot: int
    name: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """What a model did on a task.

    Attributes:
        task, metric: names.
        correct: by problem, in the task's order.
        failures: how many failed in each way; those kinds that occurred.
        generations: by problem, in the task's order.
        reported: metrics that the task computed itself, instead of the accuracy.
    """

    task: str
    metric: str
    correct: tuple[bool, ...]
    failures: dict[str, int]
    generations: tuple[Generation, ...]
    reported: tuple[Metric, ...] = ()

    @classmethod
    def of(cls, task: Task, generations: tuple[Generation, ...]) -> TaskResult:
        """Grade every continuation of a task."""
        pairs = zip(task.problems, generations, strict=True)
        grades = [task.grade(problem, g.text, ended=g.ended) for problem, g in pairs]
        found = Counter(grade.failure for grade in grades)
        failures = {kind: found[kind] for kind in FAILURES if found[kind]}
        correct = tuple(grade.correct for grade in grades)
        return cls(task.name, task.metric, correct, failures, generations)

    @property
    def accuracy(self) -> float:
        """The share of problems that were solved; NaN where none is right or wrong."""
        return sum(self.correct) / len(self.correct) if self.correct else math.nan

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy, from the sample's spread, as lm-eval's; NaN for one."""
        n, p = len(self.correct), self.accuracy
        return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The rows of a table of results."""
        stderr = self.stderr if len(self.correct) > 1 else None
        return self.reported or (Metric(self.task, 0, self.metric, self.accuracy, stderr),)

    @property
    def unended(self) -> int:
        """How many continuations reached the limit, correct and repeating ones included."""
        return sum(not generation.ended for generation in self.generations)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the generations."""
        return {
            "task": self.task,
            "metrics": [asdict(metric) for metric in self.metrics],
            "problems": len(self.correct),
            "failures": self.failures,
            "unended": self.unended,
            "tokens": sum(generation.tokens for generation in self.generations),
        }
