"""Distillation without labels: for a bounded time the pruned model imitates the dense one.

Weights train in fp32 copies, since the steps are smaller than what bf16 can add to a weight; the
model itself computes in its own dtype, which on CPUs with bf16 products is twice as fast.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from prunekit.arch import MLPView, decoder_layers
from prunekit.backward import padded, training_only
from prunekit.batching import Batch, Tokens, batches
from prunekit.compensate.teacher import Teacher, counted_logits
from prunekit.errors import InputError
from prunekit.ops.quick import quick_products
from prunekit.progress import progress_bar

MINUTES = 4.0
BATCH_TOKENS = 1024
LEARNING_RATE = 3e-4
BETAS = (0.9, 0.98)
CLIP = 1.0  # norm of all gradients together, of the mean divergence a token
WARMUP = 6  # steps
TIMED = 4  # steps after the first that say how many fit in the time; within the warm-up
MIXED = 64  # prompts among which those of similar length share a batch
APART = 16  # of so many prompts one trains nothing, and says how far to go
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the way that training went


@dataclass(frozen=True)
class Distilled:
    """What was trained: the steps taken, and the share of the way they went that was kept."""

    steps: int
    share: float


def check_budget(minutes: float, steps: int | None) -> None:
    """Raise InputError unless distillation has a time, or a number of steps, to train for."""
    if not 0 < minutes < math.inf:
        raise InputError(f"minutes: got {minutes}; expected a positive number of minutes")
    if steps is not None and steps < 1:
        raise InputError(f"steps: got {steps}; expected at least 1, or none to go by the minutes")


@quick_products()
def distill(
    model: nn.Module,
    views: Sequence[MLPView],
    teacher: Teacher,
    *,
    minutes: float = MINUTES,
    steps: int | None = None,
    quiet: bool = False,
) -> Distilled:
    """Train the decoder layers' matrices on the divergence from the dense model, in place.

    AdamW on KL(dense ‖ pruned) over every token of the calibration's prompts, warm-up and cosine.
    Embeddings, lm_head, norms and biases stay. The first steps are timed once, and say how many
    fit in ``minutes``; the same number of ``steps`` gives the same weights on the same machine.

    One prompt in sixteen trains nothing. In the end the weights go that share of the way from where
    they began to where training took them that is best for those prompts, by their loss and their
    divergence together: none of it, where training only learnt the others by heart.

    What is learnt is the dense model's behaviour on texts of the task, its format included: on
    held-out ones the loss can end below the dense model's own.

    Args:
        model: pruned and repaired; dtype, training mode and what requires gradients stay.
        views: its MLPs.
        teacher: heard the dense model.
        minutes: how long to train; ignored where ``steps`` is given.
        steps: how many batches of 1024 tokens to train on.
        quiet: no progress bar.

    Returns:
        The number of steps taken, and the share of the way that was kept.

    Raises:
        InputError: a gradient is not finite; the model is then half trained.

    Cost:
        A forward and a backward a step: 6 FLOP a token and weight. 20 bytes a trained weight, the
        activations of 1024 tokens, and 16·V bytes of logits for each of these.

    Source:
        Distillation: Hinton et al., arXiv 1503.02531; weights between two models:
        Wortsman et al., arXiv 2109.01903.
    """
    was_training = model.training
    model.eval()
    try:
        weights = decoder_matrices(model, views)
        with training_only(model, weights):
            return _train(model, weights, teacher, 60 * minutes, steps, quiet)
    finally:
        model.train(was_training)


def decoder_matrices(model: nn.Module, views: Sequence[MLPView]) -> list[nn.Parameter]:
    """Every matrix of the decoder layers, once."""
    layers = decoder_layers(model, list(views))
    inside = {id(p): p for layer in layers for p in layer.parameters()}
    return [p for p in inside.values() if p.dim() > 1 and p.is_floating_point()]


@torch.enable_grad()
def _train(model, weights, teacher, seconds: float, steps: int | None, quiet: bool) -> Distilled:
    masters = [w.detach().float() for w in weights]  # of fp32 weights the weights themselves
    start = [master.clone() for master in masters]
    apart = teacher.prompts[APART // 2 :: APART]
    left_out = {prompt.ids for prompt in apart}
    optimizer = torch.optim.AdamW(masters, betas=BETAS, weight_decay=0.0, fused=True)
    stream = _shuffled([p for p in teacher.prompts if p.ids not in left_out])
    done, begun, total = 0, 0.0, steps
    with progress_bar(steps or 0, "distill", "step", quiet=quiet) as bar:
        while total is None or done < total:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * _schedule(done, total)
            batch = next(stream)
            teacher.divergence(model, batch).backward()
            _step(optimizer, weights, masters, batch.tokens)
            done += 1
            bar.update()
            if done == 1:  # the first step compiles and allocates: not timed
                begun = time.perf_counter()
            if total is None and done == 1 + TIMED:
                total = max(done, int(seconds * TIMED / (time.perf_counter() - begun)))
                bar.total = total
    return Distilled(done, _settle(model, weights, start, masters, teacher, apart))


@torch.no_grad()
def _settle(model, weights, start, end, teacher: Teacher, apart: Sequence[Tokens]) -> float:
    """Put the weights where, between start and end, the prompts left apart like them best."""
    if not apart:
        return SHARES[0]
    pairs = zip(weights, end, strict=True)  # an fp32 weight is its own master: what is written to
    end = [m.clone() if m.data_ptr() == w.data_ptr() else m for w, m in pairs]
    parts, found = list(batches(apart, BATCH_TOKENS)), {}
    for share in SHARES:
        _place(weights, start, end, share)
        said = [teacher.verdict(counted_logits(model, batch), batch) for batch in parts]
        found[share] = sum(each.mixed for each in said)
    best = min(found, key=found.__getitem__)
    _place(weights, start, end, best)
    return best


def _place(weights, start, end, share: float) -> None:
    for weight, a, b in zip(weights, start, end, strict=True):
        weight.copy_(torch.lerp(a, b, share))


def _schedule(done: int, total: int | None) -> float:
    """The part of the learning rate after ``done`` steps; the warm-up depends on no total."""
    if done < WARMUP:
        return (done + 1) / WARMUP
    return (1 + math.cos(math.pi * (done - WARMUP) / (total - WARMUP))) / 2


def _step(optimizer, weights, masters, tokens: int) -> None:
    """One step, from the gradient of a sum: small dtypes hold it better than a mean's."""
    for weight, master in zip(weights, masters, strict=True):
        # An expert that no token reached has no gradient.
        master.grad = None if weight.grad is None else weight.grad.float() / tokens
        weight.grad = None
    norm = nn.utils.clip_grad_norm_(masters, CLIP)
    if not torch.isfinite(norm):
        raise InputError(
            "compensate distill: got gradients with NaN or Inf, expected finite ones; "
            "load the model in bf16 or fp32"
        )
    optimizer.step()
    with torch.no_grad():
        for weight, master in zip(weights, masters, strict=True):
            weight.copy_(master)


def _shuffled(prompts: Sequence[Tokens]) -> Iterator[Batch]:
    """Batches without end, every prompt once an epoch, in an order that depends on nothing else."""
    draw = random.Random(0)
    while True:
        order = list(prompts)
        draw.shuffle(order)
        groups = [order[i : i + MIXED] for i in range(0, len(order), MIXED)]
        epoch = [batch for group in groups for batch in batches(group, BATCH_TOKENS)]
        draw.shuffle(epoch)
        yield from (replace(batch, ids=padded(batch)) for batch in epoch)
