"""What a protocol names, read: corpora, a share of each held out, and tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunekit.corpus import Corpus, Example, read_corpus
from prunekit.errors import InputError
from prunekit.experiment.protocol import Protocol, Source
from prunekit.tasks.arithmetic import arithmetic_corpus
from prunekit.tasks.base import Problem, Task
from prunekit.tasks.embedded import humaneval, word_problems
from prunekit.tasks.lm_eval import LmEvalTask
from prunekit.tasks.read import read_task

MADE = 200  # rows of a corpus that is made, where none are asked for


def _humaneval(source: Source, rows: int) -> Corpus:
    examples = [
        e for pair in zip(*(half.examples for half in humaneval()), strict=True) for e in pair
    ]
    return Corpus("HumanEval", tuple(examples[:rows]))


MAKERS: dict[str, Callable[[Source, int], Corpus]] = {
    "arithmetic": lambda source, rows: arithmetic_corpus(rows, seed=source.seed),
    "word-problems": lambda source, rows: word_problems(rows, seed=source.seed),
    "humaneval": _humaneval,
}


@dataclass(frozen=True)
class Material:
    """Everything that a sweep reads.

    Attributes:
        target, distractors: what calibrates.
        losses: what is measured, by name: ``target``, and each corpus off task.
        tasks: the tasks, and the tokens that an answer may have (None: as the task says).
    """

    target: Corpus
    distractors: list[Corpus]
    losses: dict[str, Corpus]
    tasks: list[tuple[Task | LmEvalTask, int | None]]

    def facts(self) -> dict[str, Any]:
        """What was read, by hash: what the results of a sweep depend on."""
        return {
            "target": self.target.hash,
            "distractors": [corpus.hash for corpus in self.distractors],
            "losses": {name: corpus.hash for name, corpus in self.losses.items()},
            "tasks": [
                [task.name, tokens, [(p.id, p.prompt, p.answer) for p in problems_of(task)]]
                for task, tokens in self.tasks
            ],
        }


def read_material(
    protocol: Protocol, tokenizer: Any, *, allow_code_execution: bool = False
) -> Material:
    """Read the corpora and tasks of a protocol.

    Raises:
        InputError: one cannot be read, or is too small to be split.
    """
    target, held_out = split(corpus_of(protocol.target, tokenizer), protocol.held_out)
    losses, distractors = {"target": held_out}, []
    for source in protocol.distractors:
        kept, rest = split(corpus_of(source, tokenizer), protocol.held_out)
        distractors.append(kept)
        losses[_free(source.source, losses)] = rest
    for source in protocol.off_task:
        losses[_free(source.source, losses)] = corpus_of(source, tokenizer)
    return Material(target, distractors, losses, _tasks(protocol, allow_code_execution))


def corpus_of(source: Source, tokenizer: Any) -> Corpus:
    """Read or make one corpus."""
    if source.source in MAKERS:
        return MAKERS[source.source](source, source.rows or MADE)
    columns = {k: v for k in ("prompt", "completion") if (v := getattr(source, k))}
    return read_corpus(source.source, tokenizer, limit=source.rows or None, columns=columns)


def split(corpus: Corpus, share: float) -> tuple[Corpus, Corpus]:
    """A corpus without a share of its examples, taken evenly, and those.

    Raises:
        InputError: one of the parts would be empty.
    """
    parts: tuple[list[Example], list[Example]] = ([], [])
    for i, example in enumerate(corpus.examples):
        parts[int((i + 1) * share + 1e-9) > int(i * share + 1e-9)].append(example)
    if not all(parts):
        raise InputError(
            f"{corpus.name}: got {len(corpus.examples)} rows; expected enough to hold "
            f"{share:g} of them out"
        )
    kept, rest = (Corpus(corpus.name, tuple(part)) for part in parts)
    return kept, rest


def _tasks(
    protocol: Protocol, allow_code_execution: bool
) -> list[tuple[Task | LmEvalTask, int | None]]:
    found = []
    for task in protocol.tasks:
        options = {"limit": task.problems, "seed": task.seed}
        options["allow_code_execution"] = allow_code_execution
        found.append((read_task(task.spec, **options), task.max_new_tokens or None))
    return found


def problems_of(task: Task | LmEvalTask) -> tuple[Problem, ...]:
    """The problems of a task; none where lm-eval keeps them to itself."""
    return getattr(task, "problems", ())


def _free(name: str, taken: dict[str, Corpus]) -> str:
    """The name, with a number where it is taken."""
    name = name.rsplit("/", 1)[-1] if not name.startswith("hf:") else name
    found, number = name, 2
    while found in taken:
        found, number = f"{name} {number}", number + 1
    return found
