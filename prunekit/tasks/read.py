"""From the name of a task to the task."""

from __future__ import annotations

from prunekit.errors import InputError
from prunekit.tasks.arithmetic import arithmetic
from prunekit.tasks.base import Task
from prunekit.tasks.gsm8k import gsm8k
from prunekit.tasks.humaneval import humaneval
from prunekit.tasks.jsonl import jsonl
from prunekit.tasks.lm_eval import LmEvalTask, lm_eval
from prunekit.tasks.reasoning_gym import reasoning_gym

SPECS = "gsm8k:FILE, humaneval, arithmetic, reasoning-gym:NAME, jsonl:FILE, lm-eval:NAME"
_DRAWN = 200  # of a task that makes its problems, unless told otherwise


def read_task(
    spec: str, *, limit: int = 0, seed: int = 0, allow_code_execution: bool = False
) -> Task | LmEvalTask:
    """Make the task that a name stands for.

    Args:
        spec: ``gsm8k:FILE``, ``humaneval``, ``arithmetic``, ``reasoning-gym:NAME``, ``jsonl:FILE``
            or ``lm-eval:NAME``.
        limit: take the first so many problems; 0: all, or 200 of a task that makes its own.
        seed: which problems such a task makes.
        allow_code_execution: a task may run what the model writes.

    Raises:
        InputError: there is no such task, what it needs is missing, or it may not run code.
    """
    if limit < 0:
        raise InputError(f"limit: got {limit}; expected how many problems, or 0 for all")
    match spec.partition(":"):
        case "humaneval", "", "":
            return humaneval(limit=limit, allow_code_execution=allow_code_execution)
        case "arithmetic", "", "":
            return arithmetic(limit or _DRAWN, seed=seed)
        case "reasoning-gym", _, name if name:
            return reasoning_gym(name, count=limit or _DRAWN, seed=seed)
        case "gsm8k", _, path if path:
            return gsm8k(path, limit=limit)
        case "jsonl", _, path if path:
            return jsonl(path, limit=limit)
        case "lm-eval", _, name if name:
            return lm_eval(name, limit=limit, allow_code_execution=allow_code_execution)
    raise InputError(f"task: got {spec!r}; expected one of {SPECS}")
