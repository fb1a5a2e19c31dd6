"""`prunekit eval`: a model's loss on held-out corpora and accuracy on tasks, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunekit.cli.output import Output, count
from prunekit.cli.sources import corpora
from prunekit.config import EvalConfig
from prunekit.corpus import Corpus
from prunekit.errors import InputError
from prunekit.evaluate import evaluate
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.measure.provenance import provenance
from prunekit.tasks import FAILURES, TaskResult, evaluate_task, read_task
from prunekit.tasks.run import AnyTask

CONFIG = EvalConfig
EXAMPLES = """  prunekit eval small --data held_out.jsonl
  prunekit eval small --data held_out.jsonl other.jsonl --samples 2
  prunekit eval small --baseline demo --data target.jsonl off_task.jsonl
  prunekit eval small --baseline demo --task humaneval --allow-code-execution
  prunekit eval small --task gsm8k:test.jsonl arithmetic --limit 200 --generations runs
  prunekit eval small --data held_out.jsonl --limit 100 --json"""


def run(config: EvalConfig, output: Output) -> int:
    """Measure and print the loss on every corpus, and the accuracy on every task."""
    _check(config)
    tokenizer = load_tokenizer(config.model)
    data = corpora(config.data, tokenizer, config.limit)
    allowed = config.allow_code_execution
    tasks = [read_task(s, limit=config.limit, allow_code_execution=allowed) for s in config.task]
    model = load(config.model, dtype=config.dtype)
    dense = load(config.baseline, dtype=config.dtype) if config.baseline else None
    result = _losses(config, output, model, dense, tokenizer, data) if data else {}
    if tasks:
        result["tasks"] = _accuracies(config, output, model, dense, tokenizer, tasks)
    output.json({"model": config.model, **result, "provenance": provenance()})
    return 0


def _check(config: EvalConfig) -> None:
    if not config.data and not config.task:
        raise InputError("needs --data FILE or --task TASK; see `prunekit eval --help`")
    for option, least in (("batch_size", 1), ("max_new_tokens", 0)):
        given = getattr(config, option)
        if given < least:
            flag = option.replace("_", "-")
            raise InputError(f"--{flag}: got {given}; expected at least {least}")


def _losses(
    config: EvalConfig, output: Output, model: Any, dense: Any, tokenizer: Any, data: list[Corpus]
) -> dict[str, Any]:
    options = {
        "max_length": config.max_length,
        "batch_tokens": config.batch_tokens,
        "quiet": config.quiet,
    }
    result = evaluate(model, tokenizer, data, samples=config.samples, **options)
    rows = [
        (r["corpus"], f"{r['loss']:.4f}", f"{r['stderr']:.4f}", count(r["tokens"]), r["prompts"])
        for r in result["loss"]
    ]
    columns = ("corpus", "loss (nats/token)", "± stderr", "tokens", "prompts")
    if dense is not None:
        theirs = evaluate(dense, tokenizer, data, **options)
        for mine, other in zip(result["loss"], theirs["loss"], strict=True):
            mine |= {"dense": other["loss"], "rise": mine["loss"] - other["loss"]}
        columns += ("dense", "rise")
        rows = [
            (*row, f"{r['dense']:.4f}", f"{r['rise']:+.4f}")
            for row, r in zip(rows, result["loss"], strict=True)
        ]
    output.table(config.model, columns, rows)
    for sample in result["samples"]:
        output.line(f"\n--- prompt\n{sample['prompt']}\n--- completion\n{sample['completion']}")
    return result


def _accuracies(
    config: EvalConfig,
    output: Output,
    model: Any,
    dense: Any,
    tokenizer: Any,
    tasks: Sequence[AnyTask],
) -> list[dict[str, Any]]:
    """One row a metric; with a baseline, its row below, of the same problems."""
    found: list[dict[str, Any]] = []
    rows = []
    for task in tasks:
        mine = _solve(config, model, tokenizer, task, "model")
        rows += _rows(mine, config.model)
        found.append(mine.as_dict() | {"samples": _samples(task, mine, config.samples)})
        if dense is not None:
            theirs = _solve(config, dense, tokenizer, task, "baseline")
            rows += _rows(theirs, config.baseline)
            found[-1]["dense"] = theirs.as_dict()
    columns = ("Tasks", "model", "n-shot", "Metric", "Value", "± Stderr", "n", *FAILURES)
    output.table("tasks", columns, rows)
    for sample in (sample for facts in found for sample in facts["samples"]):
        verdict = sample["failure"] or "correct"
        output.line(
            f"\n--- prompt\n{sample['prompt']}\n--- completion\n{sample['completion']}"
            f"\n--- {verdict}"
        )
    return found


def _solve(config: EvalConfig, model: Any, tokenizer: Any, task: AnyTask, whose: str) -> TaskResult:
    name = task.name.replace(":", "-").replace("/", "-")
    folder = config.generations
    return evaluate_task(
        model,
        tokenizer,
        task,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens or None,
        resume=Path(folder) / f"{name}.{whose}.jsonl" if folder else None,
        quiet=config.quiet,
    )


def _rows(result: TaskResult, model: str) -> list[tuple[Any, ...]]:
    failed = [result.failures.get(kind, 0) for kind in FAILURES]
    return [
        (
            metric.task,
            model,
            metric.n_shot,
            metric.name,
            f"{metric.value:.4f}",
            "" if metric.stderr is None else f"{metric.stderr:.4f}",
            len(result.correct),
            *failed,
        )
        for metric in result.metrics
    ]


def _samples(task: AnyTask, result: TaskResult, wanted: int) -> list[dict[str, str]]:
    """The first generations with their prompts and how they failed; lm-eval's tasks show none."""
    if not result.generations:
        return []
    pairs = zip(task.problems[:wanted], result.generations, strict=False)
    return [
        {
            "prompt": problem.prompt,
            "completion": generation.text,
            "failure": task.grade(problem, generation.text, ended=generation.ended).failure,
        }
        for problem, generation in pairs
    ]
