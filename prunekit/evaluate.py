"""What a model lost: the mean loss on held-out completions, and samples to read."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.arch import input_device
from prunekit.batching import Batch, batches, encode
from prunekit.corpus import Corpus, as_corpus
from prunekit.errors import InputError
from prunekit.ops.quick import quick_products
from prunekit.progress import progress_bar
from prunekit.tasks.generate import generate_batch, new_text


@dataclass(frozen=True)
class Loss:
    """The loss on one corpus.

    Attributes:
        corpus: its name.
        loss: mean over scored tokens of the negative log likelihood, nats a token.
        stderr: standard error of that mean, prompts being the independent draws.
        tokens, prompts: how many were scored.
    """

    corpus: str
    loss: float
    stderr: float
    tokens: int
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _logits(model: nn.Module, batch: Batch, first: int) -> torch.Tensor:
    """Logits that predict the tokens from ``first`` on: [B, S - first, V]."""
    ids = batch.ids.to(input_device(model))
    keep = ids.shape[1] - first + 1
    options = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    return model(input_ids=ids, **options).logits[:, -keep:-1]


@torch.inference_mode()
def _prompt_losses(model: nn.Module, batch: Batch) -> list[tuple[float, int]]:
    """For each prompt, the sum of its scored tokens' losses and their number."""
    scored = [max(start, 1) for start in batch.scored]
    first = min(scored)
    logits = _logits(model, batch, first)
    found = []
    for row, (start, length) in enumerate(zip(scored, batch.lengths, strict=True)):
        count = max(length - start, 0)
        picked = logits[row, start - first : start - first + count].float()
        labels = batch.ids[row, start : start + count].to(picked.device)
        total = F.cross_entropy(picked, labels, reduction="sum").item() if count else 0.0
        found.append((total, count))
    return found


@quick_products()
def evaluate_loss(
    model: nn.Module,
    tokenizer: Any,
    source: str | Path | Corpus | Sequence[str],
    *,
    max_length: int = 1024,
    batch_tokens: int = 1024,
    quiet: bool = False,
) -> Loss:
    """Measure the mean loss over completion tokens (all tokens of plain ``text``).

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        source: a JSONL or CSV file, ``hf:NAME``, texts, or a Corpus; none that calibration saw.
        max_length: tokens of a prompt that are read.
        batch_tokens: tokens of a batch, padding included.
        quiet: no progress bar.

    Raises:
        InputError: the corpus cannot be read, or has no token to score, or the loss is not finite.

    Cost:
        One forward with the lm_head over all tokens.
    """
    corpus = as_corpus(source, tokenizer)
    prompts = encode(corpus, tokenizer, max_length)
    was_training = model.training
    model.eval()
    pairs: list[tuple[float, int]] = []
    with progress_bar(sum(len(p.ids) for p in prompts), "evaluate", "tok", quiet=quiet) as bar:
        for batch in batches(prompts, batch_tokens):
            pairs += _prompt_losses(model, batch)
            bar.update(batch.tokens)
    model.train(was_training)
    pairs = [(total, count) for total, count in pairs if count]
    tokens = sum(count for _, count in pairs)
    if not tokens:
        raise InputError(f"{corpus.name}: no token to score: every prompt is one token, or cut")
    mean = sum(total for total, _ in pairs) / tokens
    if mean != mean:
        raise InputError(f"{corpus.name}: the loss is NaN; the model's weights are broken")
    spread = sum((total - mean * count) ** 2 for total, count in pairs) ** 0.5
    return Loss(corpus.name, mean, spread / tokens, tokens, len(pairs))


@quick_products()
def generate_samples(
    model: nn.Module,
    tokenizer: Any,
    source: str | Path | Corpus | Sequence[str],
    *,
    count: int = 1,
    new_tokens: int = 64,
    max_length: int = 1024,
) -> list[dict[str, str]]:
    """Continue the first prompts of a corpus greedily: [{"prompt": ..., "completion": ...}].

    Of a prompt that is longer than ``max_length``, or leaves the model no position for new tokens,
    the last tokens are read.
    """
    corpus = as_corpus(source, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = min(max_length, max(positions - new_tokens, 1)) if positions else max_length
    samples = []
    was_training = model.training
    model.eval()
    for example in corpus.examples[:count]:
        prompt = example.text[: example.completion_start] or example.text
        ids = list(tokenizer(prompt).input_ids)[-longest:]
        ((tokens, _),) = generate_batch(model, tokenizer, [ids], max_new_tokens=new_tokens)
        samples.append({"prompt": prompt, "completion": new_text(tokenizer, ids, tokens)})
    model.train(was_training)
    return samples


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: Sequence[str | Path | Corpus],
    *,
    samples: int = 0,
    max_length: int = 1024,
    batch_tokens: int = 1024,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure the loss on each corpus, and generate samples from the first.

    Returns:
        {"loss": [one `Loss` a corpus, as a dict], "samples": [...]}.
    """
    if not data:
        raise InputError("evaluate: no data; give at least one corpus")
    options = {"max_length": max_length, "batch_tokens": batch_tokens, "quiet": quiet}
    corpora = [as_corpus(source, tokenizer) for source in data]
    losses = [evaluate_loss(model, tokenizer, corpus, **options).as_dict() for corpus in corpora]
    text: list[dict[str, str]] = []
    if samples:
        wanted = {"count": samples, "max_length": max_length}
        text = generate_samples(model, tokenizer, corpora[0], **wanted)
    return {"loss": losses, "samples": text}
