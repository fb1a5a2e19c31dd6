"""Sums that a small model can learn to solve, so that accuracy can be lost and recovered.

A problem is `12 + 30 - 7 =`, its answer ` 35`: two or three terms of one or two digits each, drawn
by reasoning-gym's `chain_sum`. Every sum belongs either to training or to evaluation, by its hash,
so no seeds and no counts can make the two coincide.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from prunekit.corpus import Corpus, Example
from prunekit.errors import InputError
from prunekit.tasks.base import Problem, Task

_EVALUATION_SHARE = 8  # one sum in eight
_MOST_DRAWS = 10**9  # reasoning-gym draws item i of seed s from Random(s + i): keep seeds apart
_ANSWER = re.compile(r"\s*(-?\d+)(?![\d.,]*\d)")


def arithmetic(count: int = 200, *, seed: int = 0) -> Task:
    """Distinct sums, none of which `arithmetic_corpus` ever gives.

    Raises:
        InputError: the package reasoning-gym is not installed.
    """
    answers: dict[str, str] = {}
    for expression, answer in _sums(seed, evaluation=True):
        answers.setdefault(expression, answer)
        if len(answers) == count:
            break
    problems = tuple(Problem(e, f"{e} =", answer) for e, answer in answers.items())
    return Task("arithmetic", problems, _check, stop=("\n",), max_new_tokens=16)


def arithmetic_corpus(count: int, *, seed: int = 0) -> Corpus:
    """Sums with answers, for training and calibration; easy ones may come more than once.

    Raises:
        InputError: the package reasoning-gym is not installed.
    """
    sums = _sums(seed, evaluation=False)
    examples = []
    for _ in range(count):
        expression, answer = next(sums)
        prompt = f"{expression} ="
        examples.append(Example(f"{prompt} {answer}\n", len(prompt)))
    return Corpus(f"arithmetic, seed {seed}", tuple(examples))


def _sums(seed: int, *, evaluation: bool) -> Iterator[tuple[str, str]]:
    """Expressions of one part and their values, without end."""
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(
            "arithmetic: reasoning-gym is not installed; pip install 'prunekit[tasks]'"
        ) from None
    terms = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
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
    found = _ANSWER.match(text)
    return int(found[1]) == int(problem.answer) if found else None
