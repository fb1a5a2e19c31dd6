"""Procedural tasks that verify their own answers, from the package reasoning-gym."""

from __future__ import annotations

from prunekit.errors import InputError
from prunekit.tasks.base import Problem, Task

_INSTRUCTION = "Give the final answer between <answer> and </answer>."
_OPEN, _CLOSE = "<answer>", "</answer>"


def reasoning_gym(name: str, *, count: int = 200, seed: int = 0) -> Task:
    """Problems of one of reasoning-gym's datasets, judged by its own scorer; 1.0 is correct.

    The answer is what follows the last <answer>, or the whole text where there is none.

    Args:
        name: the dataset, such as ``chain_sum`` or ``spell_backward``.
        count: how many problems.
        seed: which.

    Raises:
        InputError: the package is not installed, or has no such dataset.
    """
    try:
        import reasoning_gym as gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise InputError(
            f"reasoning-gym:{name}: reasoning-gym is not installed; pip install 'prunekit[tasks]'"
        ) from None
    if name not in DATASETS:
        raise InputError(f"reasoning-gym:{name}: expected one of {', '.join(sorted(DATASETS))}")
    dataset = gym.create_dataset(name, size=count, seed=seed)
    entries = {f"{name}/{index}": dataset[index] for index in range(count)}

    def check(problem: Problem, text: str, ended: bool) -> bool | None:
        answer = text.rpartition(_OPEN)[2].strip()
        if not answer:
            return None
        return dataset.score_answer(answer, entry=entries[problem.id]) == 1.0

    problems = tuple(
        Problem(key, f"{entry['question']}\n{_INSTRUCTION}\n", str(entry["answer"]))
        for key, entry in entries.items()
    )
    return Task(
        f"reasoning-gym:{name}", problems, check, stop=(_CLOSE,), max_new_tokens=512, chat=True
    )
