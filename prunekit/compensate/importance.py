"""How much each token's error in each MLP matters to the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunekit.arch import MLPView
from prunekit.gradients import output_gradients
from prunekit.stats import NeuronStats

FLOOR = 0.05  # of the mean squared gradient: no token counts for nothing


def token_weights(
    model: nn.Module, views: Sequence[MLPView], stats: NeuronStats, *, quiet: bool = False
) -> list[torch.Tensor | None]:
    """Weigh the tokens of every MLP by the size of the loss gradient at the MLP's output.

    The weight is the norm of the gradient, not its square: between plain least squares and the
    diagonal of the Fisher matrix, which is dominated by a few tokens.

    Args:
        model: the dense model, in evaluation mode.
        views: its MLPs.
        stats: with prompts; where they hold no gradients, one backward gathers them.
        quiet: no progress bar.

    Returns:
        For each view [T] in fp32 over the tokens of the prompts, in their order: mean 1, times the
        weight of each token's prompt; None for an expert.

    Cost:
        None, or a forward and a backward without weight gradients; 4·T·L bytes.
    """
    squares = stats.gradient_squares
    if squares is None:
        squares = output_gradients(model, list(views), stats.prompts, quiet=quiet)
    lengths = torch.tensor([len(p.ids) for p in stats.prompts])
    own = torch.tensor([p.weight for p in stats.prompts]).repeat_interleave(lengths)
    return [None if s is None else own * _weigh(s) for s in squares]


def _weigh(squares: torch.Tensor) -> torch.Tensor:
    mean = squares.double().mean().item()
    if not 0 < mean < float("inf"):  # no next token, or gradients that overflowed: all alike
        return torch.ones_like(squares)
    roots = (squares / mean).clamp_min(FLOOR).sqrt()
    return roots / roots.mean()
