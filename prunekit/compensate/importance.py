"""How much each token's error in each MLP matters to the loss: one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.arch import MLPView
from prunekit.batching import Batch
from prunekit.gradients import checkpointed

FLOOR = 0.05  # of the mean squared gradient: no token counts for nothing


def token_weights(
    model: nn.Module,
    views: Sequence[MLPView],
    layers: Sequence[nn.Module],
    batches: Sequence[Batch],
) -> list[list[torch.Tensor]]:
    """Weigh the tokens of every MLP by the size of the loss gradient at the MLP's output.

    The weight is the norm of the gradient, not its square: between plain least squares and the
    diagonal of the Fisher matrix, which is dominated by a few tokens. No weight gets a gradient.

    Args:
        model: the dense model, in evaluation mode.
        views: MLPs that are no experts.
        layers: the decoder layers, which compute their activations again on the way back.
        batches: prompts; the loss is that of their completions (`Tokens.scored`).

    Returns:
        For each view, for each batch, [T] in fp32 over the tokens that are no padding: mean 1 over
        all batches, times the weight of each token's prompt.

    Cost:
        Two forwards and a backward without weight gradients; 4·T·L bytes.
    """
    found: list[list[torch.Tensor]] = [[] for _ in views]
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(checkpointed(list(layers)))
        embeddings = model.get_input_embeddings()
        stack.callback(embeddings.register_forward_hook(_require_gradient).remove)
        for batch in batches:
            for squares, rows in zip(found, _squares(model, views, batch), strict=True):
                squares.append(rows)
    own = [batch.token_weights() for batch in batches]
    return [
        [w * mine.to(w.device) for w, mine in zip(_weigh(squares), own, strict=True)]
        for squares in found
    ]


def _require_gradient(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_()


@contextmanager
def _frozen(model: nn.Module):
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@torch.enable_grad()
def _squares(model: nn.Module, views: Sequence[MLPView], batch: Batch) -> list[torch.Tensor]:
    """The squared norms of the gradients at the views' outputs: [T] each."""
    device = next(model.parameters()).device
    counted = batch.counted().to(device)
    squares = [torch.zeros(batch.tokens, device=device) for _ in views]

    def watch(index: int):
        def keep(gradient: torch.Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])[counted]
            squares[index] = rows.float().square().sum(-1)

        def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(keep)

        return hook

    labels = batch.ids.clone()
    for row, start, length in zip(labels, batch.scored, batch.lengths, strict=True):
        row[: max(start, 1)] = -100
        row[length:] = -100
    if not (labels != -100).any():
        return squares
    with ExitStack() as stack:
        for index, view in enumerate(views):
            stack.callback(view.down_owner.register_forward_hook(watch(index)).remove)
        logits = model(input_ids=batch.ids.to(device), use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:].to(logits.device)
        F.cross_entropy(
            logits[wanted != -100].float(), wanted[wanted != -100], reduction="sum"
        ).backward()
    return squares


def _weigh(squares: list[torch.Tensor]) -> list[torch.Tensor]:
    mean = torch.cat(squares).double().mean().item()
    if not 0 < mean < float("inf"):  # no completion, or gradients that overflowed: all alike
        return [torch.ones_like(s) for s in squares]
    roots = [(s / mean).clamp_min(FLOOR).sqrt() for s in squares]
    mean = torch.cat(roots).mean()
    return [r / mean for r in roots]
