"""Many pruned variants of one model, from one calibration, each measured on held-out text."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunekit.allocation import sensitivity
from prunekit.choose import planned
from prunekit.compact import prune
from prunekit.contrast import weigh
from prunekit.corpus import Corpus
from prunekit.criteria import score
from prunekit.evaluate import Loss, evaluate_loss
from prunekit.experiment.twin import twin
from prunekit.stats import NeuronStats


@dataclass(frozen=True)
class Variant:
    """One way to prune: a name for people, and the options of `plan` and `prune`."""

    name: str
    sparsity: float
    criterion: str = "auto"
    strategy: str = "selective"
    compensate: str = "sequential"
    seed: int = 0
    keep_off_task: float = 0.0
    allocation: str = "uniform"
    steps: int | None = None  # of distill


@dataclass(frozen=True)
class Outcome:
    """What became of a variant: the smaller model, and its held-out loss.

    Attributes:
        sparsity: the fraction of neurons really removed.
        seconds: from scores to the pruned model, copying the dense one not counted.
    """

    variant: Variant
    model: nn.Module
    loss: Loss
    sparsity: float
    seconds: float


def run_variants(
    model: nn.Module,
    tokenizer: Any,
    stats: NeuronStats,
    held_out: Corpus,
    variants: Sequence[Variant],
    *,
    multiple_of: int = 64,
    quiet: bool = False,
) -> Iterator[Outcome]:
    """Prune a copy of the model by each variant and measure it; the dense model stays as it is.

    A copy shares with the model, and with the others, every matrix that pruning leaves alone; one
    that distills, which trains them, shares none.

    Neurons are scored once a criterion, seed and weight of the distractor, and that time counts
    for every variant. Budget allocation reads the loss by width off the scores: those of
    reconstruction_fisher.
    """
    scored: dict[tuple[str, int, float], tuple[list[torch.Tensor], float]] = {}
    knob, weighed = 0.0, stats
    for variant in variants:
        if variant.keep_off_task != knob:
            knob = variant.keep_off_task
            weighed = weigh(stats, knob)
        smaller = copy.deepcopy(model) if variant.compensate == "distill" else twin(model)
        begun = time.perf_counter()
        way = variant.criterion, variant.seed, knob
        if way not in scored:
            scores = score(weighed, smaller, variant.criterion, seed=variant.seed)
            scored[way] = scores, time.perf_counter() - begun
            begun = time.perf_counter()
        scores, scoring = scored[way]
        chosen = planned(
            smaller,
            weighed,
            scores,
            variant.sparsity,
            compensate=variant.compensate,
            quiet=quiet,
            strategy=variant.strategy,
            allocation=variant.allocation,
            sensitivity=sensitivity(scores, smaller) if variant.allocation == "budget" else None,
            multiple_of=multiple_of,
            seed=variant.seed,
            recipe={"criterion": variant.criterion, "stats": weighed.hash},
        )
        prune(
            smaller,
            chosen,
            stats=weighed,
            compensate=variant.compensate,
            steps=variant.steps,
        )
        seconds = scoring + time.perf_counter() - begun
        loss = evaluate_loss(smaller, tokenizer, held_out, quiet=quiet)
        yield Outcome(variant, smaller, loss, chosen.sparsity, seconds)
