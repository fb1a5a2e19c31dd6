"""Anyone's own task: a JSONL file of prompts and answers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from prunekit.corpus import read_rows
from prunekit.errors import InputError
from prunekit.tasks.answers import as_number, last_number
from prunekit.tasks.base import Problem, Task

MATCHES = ("exact", "number", "contains")


def jsonl(path: str | Path, *, limit: int = 0) -> Task:
    """Problems of a JSONL file with ``prompt``, ``answer`` and, if need be, ``match``.

    A row matches by ``exact`` (the default: the text is the answer, white space around it aside),
    ``number`` (its last number is the answer) or ``contains`` (the answer stands in it). Where
    every row's match is exact and every answer one line, a line's end stops generation.

    Args:
        path: the file; answers are strings or numbers.
        limit: take the first so many problems; 0: all.

    Raises:
        InputError: no such file, or a row with a column missing or unusable, with its number.
    """
    problems, matches = [], {}
    for number, row in islice(read_rows(path), limit or None):
        problem, match = _problem(row, f"{path}:{number}", str(number))
        problems.append(problem)
        matches[problem.id] = match

    def check(problem: Problem, text: str, ended: bool) -> bool | None:
        return _check(matches[problem.id], problem.answer, text)

    lines = all(match == "exact" for match in matches.values()) and not any(
        "\n" in problem.answer for problem in problems
    )
    return Task(Path(path).stem, tuple(problems), check, stop=("\n",) if lines else ())


def _problem(row: dict[str, Any], where: str, name: str) -> tuple[Problem, str]:
    prompt, answer, match = row.get("prompt"), row.get("answer"), row.get("match", "exact")
    if not isinstance(prompt, str) or not prompt:
        raise InputError(f"{where}: expected `prompt`, a string that is not empty")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise InputError(f"{where}: expected `answer`, a string or a number")
    if match not in MATCHES:
        raise InputError(f"{where}: match: got {match!r}; expected one of {', '.join(MATCHES)}")
    answer = str(answer).strip()
    if not answer or (match == "number" and as_number(answer) is None):
        raise InputError(f"{where}: answer: got {answer!r}, which nothing can match by {match}")
    return Problem(name, prompt, answer), match


def _check(match: str, answer: str, text: str) -> bool | None:
    if not text.strip():
        return None
    if match == "exact":
        return text.strip() == answer
    if match == "contains":
        return answer in text
    found = last_number(text)
    return as_number(found) == as_number(answer) if found else None
