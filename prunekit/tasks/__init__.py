"""Tasks: problems to solve by generating, and where corpora to calibrate on come from."""

from prunekit.tasks.arithmetic import arithmetic_corpus
from prunekit.tasks.base import Generation, Grade, Problem, Task, TaskResult
from prunekit.tasks.failures import FAILURES
from prunekit.tasks.read import SPECS, read_task
from prunekit.tasks.run import evaluate_task

__all__ = [
    "FAILURES",
    "SPECS",
    "Generation",
    "Grade",
    "Problem",
    "Task",
    "TaskResult",
    "arithmetic_corpus",
    "evaluate_task",
    "read_task",
]
