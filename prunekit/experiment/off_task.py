"""What pruning for one task costs on another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.corpus import Corpus
from prunekit.evaluate import Loss, evaluate_loss
from prunekit.experiment.variants import Outcome


@dataclass(frozen=True)
class Spent:
    """What a model lost on the target and off task, in nats a token, and the knob between them."""

    name: str
    sparsity: float
    keep_off_task: float
    target: float
    off_task: float


def off_task_spent(
    dense: nn.Module,
    dense_loss: Loss,
    tokenizer: Any,
    off_task: Corpus,
    outcomes: Iterable[Outcome],
) -> Iterator[Spent]:
    """Measure, one by one, the rise of the loss of models on text of another task.

    Args:
        dense: the model before pruning.
        dense_loss: its loss on the target's held-out text.
        tokenizer: the models'.
        off_task: text that no calibration saw.
        outcomes: from `run_variants`.

    Cost:
        A forward of every model over the text.
    """
    before = evaluate_loss(dense, tokenizer, off_task, quiet=True).loss
    for o in outcomes:
        yield Spent(
            o.variant.name,
            o.sparsity,
            o.variant.keep_off_task,
            o.loss.loss - dense_loss.loss,
            evaluate_loss(o.model, tokenizer, off_task, quiet=True).loss - before,
        )
