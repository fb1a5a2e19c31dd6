"""Sums that a small model can learn to solve, so that accuracy can be lost and recovered.

A problem is `Sum: 3 + 9 - 7 =`, its solution ` 12 - 7 = 5`: two or three terms of one digit each,
drawn by reasoning-gym's `chain_sum`, and added up one by one. Every sum belongs either to training
or to evaluation, by its hash, so no seeds and no counts can make the two coincide.

`Sum: ` stands first because a model attends to its first token whatever it is, and reads a digit
there badly: of 40 sums of two terms SmolLM2-135M-Instruct, untrained, solves 5 % without it and
68 % with it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from prunekit.corpus import Corpus, Example
from prunekit.errors import InputError
from prunekit.tasks.base import Problem, Task

_EVALUATION_SHARE = 8  # one sum in eight
_PATIENCE = 50_000  # draws; a tenth of them already finds every sum there is
_MOST_DRAWS = 10**9  # reasoning-gym draws item i of seed s from Random(s + i): keep seeds apart
_ANSWER = re.compile(r"\s*(-?\d+)(?![\d.,]*\d)")


def arithmetic(count: int = 200, *, seed: int = 0) -> Task:
    """Distinct sums, none of which `arithmetic_corpus` ever gives.

    Raises:
        InputError: the package reasoning-gym is not installed, or there are not so many sums.
    """
    answers: dict[str, str] = {}
    for draws, (expression, answer) in enumerate(_sums(seed, evaluation=True)):
        answers.setdefault(expression, answer)
        if len(answers) == count:
            break
        if draws == _PATIENCE:
            raise InputError(f"arithmetic: got {count} problems, expected at most {len(answers)}")
    problems = tuple(Problem(e, _prompt(e), answer) for e, answer in answers.items())
    return Task("arithmetic", problems, _check, stop=("\n",), max_new_tokens=16)


def arithmetic_corpus(count: int, *, seed: int = 0) -> Corpus:
    """Sums with solutions, for training and calibration; easy ones may come more than once.

    Raises:
        InputError: the package reasoning-gym is not installed.
    """
    sums = _sums(seed, evaluation=False)
    examples = []
    for _ in range(count):
        expression, answer = next(sums)
        prompt = _prompt(expression)
        examples.append(Example(prompt + _solution(expression, answer), len(prompt)))
    return Corpus(f"arithmetic, seed {seed}", tuple(examples))


def held_out_corpus(count: int = 200, *, seed: int = 0) -> Corpus:
    """The problems of `arithmetic` with solutions, to measure the loss on."""
    examples = []
    for problem in arithmetic(count, seed=seed).problems:
        text = problem.prompt + _solution(problem.id, problem.answer)
        examples.append(Example(text, len(problem.prompt)))
    return Corpus(f"arithmetic, held out, seed {seed}", tuple(examples))


def _prompt(expression: str) -> str:
    return f"Sum: {expression} ="


def _solution(expression: str, answer: str) -> str:
    """The terms added up from the left, a term a step: ` 12 - 7 = 5`."""
    total, *rest = expression.split()
    steps = []
    while len(rest) > 2:
        sign, term, *rest = rest
        total = str(int(total) + int(sign + term))
        steps.append(f" {' '.join([total, *rest])} =")
    return f"{''.join(steps)} {answer}\n"


def _sums(seed: int, *, evaluation: bool) -> Iterator[tuple[str, str]]:
    """Expressions of one part and their values, without end."""
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(
            "arithmetic: reasoning-gym is not installed; pip install 'prunekit[tasks]'"
        ) from None
    terms = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    drawn = reasoning_gym.create_dataset(
        "chain_sum", seed=seed * _MOST_DRAWS, size=_MOST_DRAWS, **terms
    )
    for index in range(_MOST_DRAWS):
        row = drawn[index]
        expression = row["metadata"]["expression"]
        number = int.from_bytes(hashlib.sha256(expression.encode()).digest()[:4], "big")
        if (number % _EVALUATION_SHARE == 0) == evaluation:
            yield expression, row["answer"]


def _check(problem: Problem, text: str, ended: bool) -> bool | None:
    found = _ANSWER.match(text.rpartition("=")[2])
    return int(found[1]) == int(problem.answer) if found else None
