"""What the dense model says of the calibration's prompts, kept small, for who is to imitate it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.backward import IGNORED, next_tokens
from prunekit.batching import Batch, Tokens

TOP = 64  # next tokens of which each probability is kept; the others' only together
FLOOR = 1e-6  # of the others' probability: below it fp32's differences from 1 are noise


class Verdict(NamedTuple):
    """What a model makes of completions, of plain text's every token.

    Attributes:
        divergence: KL(dense ‖ model) of the next token, in nats.
        loss: of the model by itself, in nats.
        weight: of these tokens together.
    """

    divergence: float
    loss: float
    weight: float

    @property
    def mixed(self) -> float:
        """Both together: what a model is chosen by that shall serve a task and stay what it was.

        Up to a constant twice the cross-entropy against an even mixture of the dense model's next
        token and the text's.

        Source:
            Soft and hard targets: Hinton et al., arXiv 1503.02531, section 2.
        """
        return self.divergence + self.loss


class Teacher:
    """The dense model's next-token distributions on every token of some prompts.

    Kept are the ``TOP`` likeliest next tokens and their log probabilities, on the CPU, so the dense
    model itself need not outlive its pruning.

    Args:
        prompts: encoded; `hear` is to be told of each.

    Cost:
        6·TOP = 384 bytes a token.
    """

    def __init__(self, prompts: Sequence[Tokens]):
        self.prompts = list(prompts)
        self._weights = {prompt.ids: prompt.weight for prompt in prompts}
        self._said: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def hear(self, batch: Batch, logits: torch.Tensor) -> None:
        """Keep what the dense model says of a batch of the prompts; logits: [B, S, V]."""
        top, index = likeliest(counted(logits, batch))
        pairs = zip(
            _rows(batch),
            top.half().cpu().split(batch.lengths),
            index.int().cpu().split(batch.lengths),
            strict=True,
        )
        for ids, *said in pairs:
            self._said[ids] = tuple(said)

    def divergence(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """KL(dense ‖ model) summed over a batch's tokens, each as much as its prompt weighs.

        The next tokens beyond ``TOP`` are taken as one.

        Args:
            model: what imitates; gradients flow through it where they are enabled.
            batch: of the teacher's prompts.

        Returns:
            A scalar, fp32.
        """
        return self._weighed(self._divergence(counted_logits(model, batch), batch), batch).sum()

    @torch.no_grad()
    def verdict(self, logits: torch.Tensor, batch: Batch) -> Verdict:
        """Sums over the tokens of a batch's completions, each weighing as in `divergence`.

        Args:
            logits: of the tokens that are no padding: [T, V].
            batch: of the teacher's prompts.
        """
        labels = next_tokens(batch, batch.ids.to(logits.device)).flatten()
        labels = labels[batch.counted().to(logits.device)]
        scored = (labels != IGNORED).float()
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
        each = self._divergence(logits, batch) * scored, loss, scored
        return Verdict(*(self._weighed(found, batch).sum().item() for found in each))

    def _divergence(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        said = [self._said[ids] for ids in _rows(batch)]
        dense = torch.cat([top for top, _ in said]).to(logits.device, torch.float32)
        index = torch.cat([index for _, index in said]).to(logits.device, torch.int64)
        return divergence(logits, dense, index)

    def _weighed(self, found: torch.Tensor, batch: Batch) -> torch.Tensor:
        counts = [self._weights[ids] for ids in _rows(batch)]
        if set(counts) == {1.0}:
            return found
        return found * torch.tensor(counts).repeat_interleave(torch.tensor(batch.lengths)).to(found)


def _rows(batch: Batch) -> list[tuple[int, ...]]:
    """The token ids of a batch's prompts, without padding."""
    rows = zip(batch.ids.tolist(), batch.lengths, strict=True)
    return [tuple(ids[:length]) for ids, length in rows]


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``TOP`` likeliest next tokens: their log probabilities, fp32, and which: [T, TOP]."""
    wide = logits.float()
    top, index = wide.topk(min(TOP, wide.shape[-1]))
    return top - wide.logsumexp(-1, keepdim=True), index


def divergence(logits: torch.Tensor, dense: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """KL(dense ‖ model) of each token: [T], fp32.

    Args:
        logits: what the model says: [T, V].
        dense, index: what `likeliest` found in the dense model's logits: [T, TOP]. The tokens
            beyond are taken as one.
    """
    student = logits.gather(1, index).float() - logits.float().logsumexp(-1, keepdim=True)
    likely = dense.exp()
    other = (1 - likely.sum(-1)).clamp_min(FLOOR)
    student_other = (1 - student.exp().sum(-1)).clamp_min(FLOOR)
    return (likely * (dense - student)).sum(-1) + other * (other / student_other).log()


def counted_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A model's logits on the tokens of a batch that are no padding: [T, V]."""
    device = next(model.parameters()).device
    return counted(model(input_ids=batch.ids.to(device), use_cache=False).logits, batch)


def counted(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Of logits, [B, S, V], those of the tokens that are no padding: [T, V]."""
    return logits.flatten(0, 1)[batch.counted().to(logits.device)]
