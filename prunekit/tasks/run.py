"""Runs a model on a task: batches of similar prompts, continued greedily, then graded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.errors import InputError
from prunekit.files import digest
from prunekit.ops.quick import quick_products
from prunekit.progress import progress_bar
from prunekit.tasks.base import Generation, Task, TaskResult
from prunekit.tasks.generate import cut, generate_batch, new_text
from prunekit.tasks.journal import Journal
from prunekit.tasks.lm_eval import LmEvalTask

AnyTask = Task | LmEvalTask


@quick_products()
def evaluate_task(
    model: nn.Module,
    tokenizer: Any,
    task: AnyTask,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
) -> TaskResult:
    """Let a model continue every problem of a task greedily, and grade what comes.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        task: from `read_task`.
        batch_size: problems that are continued together.
        max_new_tokens: limit of new tokens, instead of the task's own.
        resume: a file that generations are appended to as they come; what it already holds of the
            same model, task and limit is not generated again. Batches are the same either way, so a
            run that was killed ends with the result of one that was not.
        quiet: no progress bar.

    Raises:
        InputError: a prompt fills the model's positions, the batch size is none, or the file is of
            another run or cannot be written.

    Cost:
        One forward of each prompt and of each new token. In bf16, batches of another size may
        choose differently between tokens that are all but equally likely.
    """
    if batch_size < 1:
        raise InputError(f"batch size: got {batch_size}; expected at least 1")
    if isinstance(task, LmEvalTask):
        return task.evaluate(model, tokenizer, batch_size=batch_size)
    limit = max_new_tokens or task.max_new_tokens
    journal = Journal(resume, _header(model, task, limit)) if resume else None
    done = dict(journal.done) if journal else {}
    prompts = [_encode(tokenizer, problem.prompt, task.chat) for problem in task.problems]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    was_training = model.training
    model.eval()
    with progress_bar(len(prompts), task.name, "problem", quiet=quiet) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = [task.problems[row].id for row in rows]
            if not all(name in done for name in ids):
                inputs = [prompts[row] for row in rows]
                options = {"stop": task.stop, "max_new_tokens": limit}
                found = generate_batch(model, tokenizer, inputs, **options)
                texts = [
                    cut(new_text(tokenizer, prompt, tokens), task.stop)[0]
                    for prompt, (tokens, _) in zip(inputs, found, strict=True)
                ]
                new = [
                    Generation(name, text, ended, len(tokens))
                    for name, text, (tokens, ended) in zip(ids, texts, found, strict=True)
                ]
                done |= {generation.id: generation for generation in new}
                if journal:
                    journal.add(new)
            bar.update(len(rows))
    model.train(was_training)
    return TaskResult.of(task, tuple(done[problem.id] for problem in task.problems))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer(prompt).input_ids)


def _header(model: nn.Module, task: Task, limit: int) -> dict[str, Any]:
    """What a file of generations must agree in."""
    problems = [(p.id, p.prompt) for p in task.problems]
    return {
        "model": _fingerprint(model),
        "task": digest([task.name, problems, task.stop, task.chat]),
        "max_new_tokens": limit,
    }


def _fingerprint(model: nn.Module) -> str:
    """A hash of shapes and of a few weights of every parameter: pruning and training change it."""
    few = 16
    parts = []
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        picked = torch.cat([flat[:few], flat[-few:]]).float().cpu()
        parts.append((name, tuple(weight.shape), str(weight.dtype), picked.tolist()))
    return digest(parts)
