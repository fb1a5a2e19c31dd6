"""GSM8K: grade-school word problems, judged by the number they come to."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from prunekit.corpus import read_rows
from prunekit.errors import InputError
from prunekit.tasks.answers import boxed, check_math_verify, equivalent, last_number
from prunekit.tasks.answers import without_calculator as plain
from prunekit.tasks.base import Problem, Task

_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_MARK = "####"


def gsm8k(path: str | Path, *, limit: int = 0) -> Task:
    """Word problems of a JSONL file with ``question`` and ``answer``, as GSM8K is published.

    The answer is what stands in the last \\boxed{}; else what follows the last ####; else, of a
    text that ended, its last number.

    Args:
        path: the file; the number that an answer comes to follows its ####, or is all of it.
        limit: take the first so many problems; 0: all.

    Raises:
        InputError: no such file, a column is missing, an answer has no number, or math-verify is
            not installed.

    Source:
        Cobbe et al., arXiv 2110.14168; boxed answers and 1024 new tokens as in arXiv 2604.27115.
    """
    check_math_verify("gsm8k")
    problems = []
    for number, row in islice(read_rows(path), limit or None):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise InputError(f"{path}:{number}: expected `question` and `answer`, both strings")
        gold = last_number(plain(answer).rpartition(_MARK)[2])
        if gold is None:
            raise InputError(f"{path}:{number}: the answer has no number after {_MARK}")
        problems.append(Problem(f"gsm8k/{number}", f"{question}\n{_INSTRUCTION}\n", gold))
    return Task("gsm8k", tuple(problems), _check, max_new_tokens=1024, chat=True)


def final_answer(text: str, *, ended: bool) -> str | None:
    """The answer that a solution comes to, if it comes to one."""
    text = plain(text)
    if (found := boxed(text)) is not None:
        return found
    if _MARK in text:
        after = text.rpartition(_MARK)[2].strip().partition("\n")[0]
        return last_number(after) or after or None
    return last_number(text) if ended else None


def _check(problem: Problem, text: str, ended: bool) -> bool | None:
    found = final_answer(text, ended=ended)
    return equivalent(problem.answer, found) if found else None
