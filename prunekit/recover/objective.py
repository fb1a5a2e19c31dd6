"""What a recovery minimises: the next token's loss, or the distance from the dense model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.arch import text_config
from prunekit.backward import IGNORED
from prunekit.compensate.teacher import divergence, likeliest
from prunekit.errors import InputError
from prunekit.recover.settings import Settings


class NextToken:
    """The negative log likelihood of the labelled tokens, summed, in nats."""

    def __call__(self, model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Run a batch: ids and labels [B, S], the labels of what each position holds."""
        logits, _, wanted = _labelled(model, ids, labels)
        return F.cross_entropy(logits.float(), wanted.to(logits.device), reduction="sum")


class Imitation:
    """The distance from the dense model on the labelled tokens, summed.

    ``logits_weight`` · KL(dense ‖ model) of the next token, and ``hidden_weight`` · the squared
    error of each layer's output relative to the square of the dense model's, mean over layers.

    Args:
        teacher: the dense model; its weights do not change.
        settings: has both weights.

    Cost:
        A forward of the dense model beside every forward of the other.

    Source:
        Hinton et al., arXiv 1503.02531; hidden states: Sanh et al., arXiv 1910.01108.
    """

    def __init__(self, teacher: nn.Module, settings: Settings):
        self.teacher, self.settings = teacher, settings
        self._reads_hidden = settings.hidden_weight > 0

    def __call__(self, model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Run a batch through both: ids and labels [B, S]."""
        options = {"output_hidden_states": self._reads_hidden}
        with torch.no_grad():
            self.teacher.to(ids.device).eval()
            said, dense_hidden, _ = _labelled(self.teacher, ids, labels, **options)
        logits, hidden, _ = _labelled(model, ids, labels, **options)
        total = logits.new_zeros((), dtype=torch.float32)
        if self.settings.logits_weight:
            total = total + self.settings.logits_weight * divergence(logits, *likeliest(said)).sum()
        if self._reads_hidden:
            pairs = zip(hidden, dense_hidden, strict=True)
            errors = [_relative_error(mine, theirs) for mine, theirs in pairs]
            total = total + self.settings.hidden_weight * torch.stack(errors).mean()
        return total


def check_teacher(model: nn.Module, teacher: nn.Module, settings: Settings) -> None:
    """Raise InputError unless a model can be compared with the dense one, token by token."""
    mine, theirs = text_config(model), text_config(teacher)
    names = ("vocab_size", "hidden_size", "num_hidden_layers")
    for name in names if settings.hidden_weight else names[:1]:
        got, expected = getattr(theirs, name), getattr(mine, name)
        if got != expected:
            raise InputError(
                f"teacher: got {name} {got}, expected the model's {expected}; take the dense model "
                "that it was pruned from"
            )


def _relative_error(mine: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Squared error of each token relative to the dense square, summed over tokens: a scalar."""
    dense = dense.float()
    error = (mine.float() - dense).square().sum(-1)
    return (error / dense.square().sum(-1).clamp_min(1e-6)).sum()


def _labelled(
    model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Logits [T, V], layers' outputs [T, D] and labels [T] where the next token has a label.

    The head computes the columns that some example needs, where the model lets it be told.
    """
    wanted = labels[:, 1:]
    columns = (wanted != IGNORED).any(0).nonzero().flatten()
    inner = getattr(model, "module", model)  # a data-parallel wrapper has no signature of its own
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    picks = "logits_to_keep" in inspect.signature(inner.forward).parameters
    if picks:
        options["logits_to_keep"] = columns
    found = model(input_ids=ids, use_cache=False, **options)
    known = (wanted != IGNORED)[:, columns]
    logits = found.logits if picks else found.logits[:, columns]
    hidden = [layer[:, columns][known] for layer in (found.hidden_states or ())[1:]]
    return logits[known], hidden, wanted[:, columns][known]
