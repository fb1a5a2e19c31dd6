"""Distillation without labels: for a bounded time the pruned model imitates the dense one."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.arch import MLPView
from prunekit.batching import Batch, batches
from prunekit.compensate.streams import in_fp32
from prunekit.progress import progress_bar
from prunekit.stats import NeuronStats

logger = logging.getLogger(__name__)

BATCH_TOKENS = 1024
LEARNING_RATE = 2e-4
WARMUP = 10  # steps
BETAS = (0.9, 0.99)
CLIP = 1.0  # norm of all gradients together
HELD_OUT = 10  # every tenth prompt judges, and is not learnt from
JUDGEMENTS = 8  # how often in the time there is


class Teacher:
    """What the dense model says of the calibration's prompts, kept while it is pruned.

    Only its last hidden states are kept, 4·T·D bytes; the logits come from them by the lm_head,
    which pruning and distillation leave alone.

    Args:
        model: the dense model.
        stats: with prompts.
    """

    def __init__(self, model: nn.Module, stats: NeuronStats):
        held_out = stats.prompts[::HELD_OUT] if len(stats.prompts) >= 2 * HELD_OUT else []
        learnt = [p for i, p in enumerate(stats.prompts) if not held_out or i % HELD_OUT]
        self.learnt = [self._say(model, b) for b in batches(learnt, BATCH_TOKENS)]
        self.judged = [self._say(model, b) for b in batches(held_out, BATCH_TOKENS)]

    @staticmethod
    @torch.no_grad()
    def _say(model: nn.Module, batch: Batch) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """The batch, the rows whose next token counts, and the hidden states there."""
        counts = torch.zeros(batch.ids.shape, dtype=torch.bool)
        for row, start, length in zip(counts, batch.scored, batch.lengths, strict=True):
            row[max(start, 1) - 1 : length - 1] = True
        counts = counts.to(next(model.parameters()).device)
        return batch, counts, _hidden(model, batch)[counts]

    def teach(
        self, model: nn.Module, views: Sequence[MLPView], *, minutes: float, quiet: bool = False
    ) -> None:
        """Train the MLPs' matrices on the divergence from the dense model, in place.

        Adam on KL(dense ‖ pruned) of the next token, at the completions of the prompts, in fp32
        (bf16 models multiply as bf16 on the CPU). The learning rate falls along a cosine that ends
        with the time. Every tenth prompt is held out, and the weights that do best there are taken:
        the ones it began with, if nothing was better.

        Args:
            model: pruned and repaired.
            views: its MLPs.
            minutes: when to stop.
            quiet: no progress bar.

        Cost:
            A forward and a backward a step; 20 bytes a weight of the MLPs, 8·T·V of logits.
        """
        parameters = {
            s.parameter: None for v in views for r, s in v.slots.items() if "bias" not in r
        }
        training = model.training
        required = {p: p.requires_grad for p in model.parameters()}
        with ExitStack() as stack:
            stack.enter_context(in_fp32(model))
            for parameter in required:
                parameter.requires_grad_(parameter in parameters)
            try:
                model.eval()
                self._train(model, list(parameters), 60 * minutes, quiet)
            finally:
                model.train(training)
                for parameter, was in required.items():
                    parameter.requires_grad_(was)
                    parameter.grad = None

    def _train(self, model, parameters: list[nn.Parameter], seconds: float, quiet: bool) -> None:
        optimiser = torch.optim.Adam(parameters, LEARNING_RATE, BETAS, foreach=True)
        best, kept = self._judge(model), [p.detach().cpu().clone() for p in parameters]
        begun, step, judged, first = time.monotonic(), 0, 0, best
        order = _shuffled(self.learnt)
        with progress_bar(int(seconds), "distill", "s", quiet=quiet) as bar:
            while (spent := time.monotonic() - begun) < seconds:
                part = spent / seconds
                warm = min(1.0, (step + 1) / WARMUP)
                for group in optimiser.param_groups:
                    group["lr"] = LEARNING_RATE * warm * (1 + math.cos(math.pi * part)) / 2
                optimiser.zero_grad()
                loss, count = self._divergence(model, next(order))
                (loss / max(count, 1)).backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimiser.step()
                step += 1
                bar.update(int(spent) - bar.n)
                if int(part * JUDGEMENTS) > judged:
                    judged = int(part * JUDGEMENTS)
                    best, kept = self._better(model, parameters, best, kept)
        best, kept = self._better(model, parameters, best, kept)
        with torch.no_grad():
            for parameter, weight in zip(parameters, kept, strict=True):
                parameter.copy_(weight)
        logger.info("distill: %d steps; held-out divergence %.4f -> %.4f", step, first, best)

    def _better(self, model, parameters, best: float, kept: list[torch.Tensor]):
        now = self._judge(model)
        if not now <= best:
            return best, kept
        return now, [p.detach().cpu().clone() for p in parameters]

    @torch.no_grad()
    def _judge(self, model: nn.Module) -> float:
        pairs = [self._divergence(model, said) for said in self.judged]
        count = sum(count for _, count in pairs)
        return float(sum(loss for loss, _ in pairs)) / count if count else math.inf

    @staticmethod
    def _divergence(model: nn.Module, said) -> tuple[torch.Tensor, int]:
        """KL(dense ‖ pruned), summed over the tokens that count, and their number."""
        batch, rows, dense = said
        head = model.get_output_embeddings()
        with torch.no_grad():
            wanted = F.log_softmax(head(dense.to(head.weight.dtype)).float(), -1)
        got = F.log_softmax(head(_hidden(model, batch)[rows]).float(), -1)
        return F.kl_div(got, wanted, reduction="sum", log_target=True), len(dense)


def _hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return decoder(input_ids=batch.ids.to(next(model.parameters()).device), use_cache=False)[0]


def _shuffled(said: list):
    draw = random.Random(0)
    while True:
        order = copy.copy(said)
        draw.shuffle(order)
        yield from order
