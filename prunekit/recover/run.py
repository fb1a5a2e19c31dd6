"""`recover`: trains a model, pruned or dense, and can go on where a kill stopped it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import files
from prunekit.arch import check_finite, find_mlps, fingerprint
from prunekit.corpus import Corpus, as_corpus
from prunekit.errors import InputError
from prunekit.evaluate import Loss, evaluate_loss
from prunekit.recover.data import training_tokens
from prunekit.recover.methods import trainable
from prunekit.recover.objective import Imitation, NextToken, check_teacher
from prunekit.recover.settings import Settings, differences, resolve

Source = str | Path | Corpus | Sequence[str]

SAVE_EVERY = 100  # steps
_MEASURED = 100  # training examples that the loss is measured on where none are held out
_RUN = "run.json"


def recover(
    model: nn.Module,
    tokenizer: Any,
    data: Source,
    *,
    method: str | None = None,
    teacher: nn.Module | None = None,
    preset: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch: int | None = None,
    accumulation: int | None = None,
    warmup: float | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    logits_weight: float | None = None,
    hidden_weight: float | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    held_out: Source | None = None,
    folder: str | Path | None = None,
    save_every: int = SAVE_EVERY,
    resume: bool = False,
    keep_adapter: str | Path | None = None,
    quiet: bool = True,
) -> nn.Module:
    """Train a model in place: what pruning lost comes back, or a dense model learns a task.

    The loss is taken of completions, where the data has them, and of all tokens of plain text.
    The same seed and data give the same weights on the same machine, with a kill between or not;
    the seed is that of Python's, numpy's and torch's own generators too.

    Args:
        model: a causal language model, dense or pruned, its widths equal or not.
        tokenizer: its tokenizer.
        data: a JSONL or CSV file, ``hf:NAME``, texts, or a Corpus.
        method: lora (default), full, or distill: to imitate ``teacher`` on the data.
        teacher: the dense model, of the same tokenizer.
        preset: paper-math or paper-code: the hyperparameters of arXiv 2604.27115.
        epochs, steps, learning_rate, batch, accumulation, warmup, max_length, limit: see
            `recover.Settings`; None takes the preset's, or the method's default.
        rank, alpha, dropout, logits_weight, hidden_weight, dtype, seed: so are these.
        held_out: a corpus to measure the loss on, before and after; by default the first of the
            data itself.
        folder: for checkpoints; None writes none.
        save_every: steps between checkpoints.
        resume: go on from the newest whole checkpoint in ``folder``; begin where there is none.
        keep_adapter: a folder to write LoRA's adapter to as well, before it is merged.
        quiet: no progress bar.

    Returns:
        The same model, in its dtype; ``model.prunekit["recovery"]`` records what was done, the loss
        before and after, and the loss of every step.

    Raises:
        InputError: an unknown method or preset, a number out of range, no data, no teacher or one
            of another vocabulary, a checkpoint of another run, or a loss that is not finite; a
            failure in training leaves the model half trained (with lora: as it was).
        Stopped: with ``folder``, Ctrl-C or SIGTERM came; ``resume`` goes on after the step that it
            came in.

    Cost:
        6 FLOP a token and trained weight, 4 with lora, and the dense model's 2 with distill; 16
        bytes a trained weight, and the activations of a batch.

    Source:
        LoRA: Hu et al., arXiv 2106.09685; distillation: `recover.objective`.
    """
    chosen = resolve(
        preset,
        method=method,
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        batch=batch,
        accumulation=accumulation,
        warmup=warmup,
        max_length=max_length,
        limit=limit,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        logits_weight=logits_weight,
        hidden_weight=hidden_weight,
        dtype=dtype,
        seed=seed,
    )
    _check(model, teacher, chosen, folder, save_every, resume, keep_adapter)
    corpus = as_corpus(data, tokenizer)
    corpus = Corpus(corpus.name, corpus.examples[: chosen.limit or None])
    prompts = training_tokens(corpus, tokenizer, chosen.max_length)
    facts = _facts(chosen, corpus, prompts, teacher)
    checkpoint = _prepare(Path(folder), model, facts, resume) if folder else None
    measured = corpus if held_out is None else as_corpus(held_out, tokenizer)
    if held_out is None:
        measured = Corpus(corpus.name, corpus.examples[:_MEASURED])
    options = {"max_length": chosen.max_length, "quiet": quiet}
    before = evaluate_loss(model, tokenizer, measured, **options)
    begun = time.perf_counter()
    adapter = Path(keep_adapter) if keep_adapter and is_first_process() else None
    curve = _train(model, teacher, prompts, chosen, adapter, folder, save_every, checkpoint, quiet)
    facts |= {"steps": len(curve), "seconds": round(time.perf_counter() - begun, 1)}
    after = evaluate_loss(model, tokenizer, measured, **options)
    facts["loss"] = _losses(before, after, held_out is not None)
    known = getattr(model, "prunekit", None) or {}
    model.prunekit = {**known, "recovery": facts, "curve": curve}
    return model


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _check(model, teacher, chosen: Settings, folder, save_every: int, resume: bool, adapter):
    if chosen.method == "distill":
        if teacher is None:
            raise InputError("method distill: needs the dense model as its teacher")
        check_teacher(model, teacher, chosen)
    elif teacher is not None:
        raise InputError(f"method {chosen.method}: takes no teacher; use distill")
    if adapter and chosen.method != "lora":
        raise InputError(f"keep_adapter: method {chosen.method} has no adapter; use lora")
    if resume and not folder:
        raise InputError("resume: needs the folder of the checkpoints")
    if save_every < 1:
        raise InputError(f"save_every: got {save_every}; expected at least 1")
    views = find_mlps(model, verify=False)
    check_finite(model, views)
    for view in views:
        if not view.readable:
            raise InputError(f"recover: {view.name} is offloaded or quantised; load it as it is")


def _train(model, teacher, prompts, chosen, adapter, folder, save_every, checkpoint, quiet):
    from prunekit.recover.trainer import Recovery

    objective = NextToken() if teacher is None else Imitation(teacher, chosen)
    was_training, device = model.training, next(model.parameters()).device
    places = {"folder": Path(folder) if folder else None, "save_every": save_every}
    try:
        with trainable(model, chosen, adapter) as trained:
            trainer = Recovery(trained, objective, prompts, chosen, quiet=quiet, **places)
            trainer.run(checkpoint)
            return trainer.curve()
    finally:
        model.train(was_training).to(device)


def _facts(chosen: Settings, corpus: Corpus, prompts, teacher) -> dict[str, Any]:
    data = {
        "name": corpus.name,
        "hash": corpus.hash,
        "examples": len(prompts),
        "tokens": sum(len(prompt.ids) for prompt in prompts),
    }
    name = teacher and getattr(teacher.config, "_name_or_path", "")
    return {"settings": vars(chosen), "data": data, "teacher": name}


def _prepare(folder: Path, model: nn.Module, facts: dict[str, Any], resume: bool) -> Path | None:
    """Begin a folder of checkpoints, or find the one to go on from."""
    from prunekit.recover.trainer import checkpoint_to_resume

    if not is_first_process():
        return checkpoint_to_resume(folder) if resume else None
    whole = {"data": facts["data"]["hash"], "teacher": facts["teacher"]}
    whole |= {"model": fingerprint(find_mlps(model, verify=False))}
    run = json.loads(json.dumps({**facts["settings"], **whole}))
    begun = (folder / _RUN).is_file()
    if begun and not resume:
        raise InputError(f"{folder}: holds a run already; resume it, or remove it")
    if begun and (found := differences(run, files.read_json(folder / _RUN))):
        raise InputError(f"resume: {folder} was begun otherwise: {found}; remove it to begin anew")
    if not begun:
        files.write_json(folder / _RUN, run)
    return checkpoint_to_resume(folder) if begun else None


def _losses(before: Loss, after: Loss, held_out: bool) -> dict[str, Any]:
    return {
        "corpus": before.corpus,
        "held_out": held_out,
        "before": before.loss,
        "after": after.loss,
        "stderr": after.stderr,
        "tokens": after.tokens,
    }
