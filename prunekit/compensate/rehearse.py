"""What a plan is worth: a repair of which some prompts know nothing, and what it does to these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunekit.arch import MLPView
from prunekit.compensate.sequential import HELD_OUT, walked
from prunekit.compensate.streams import logits_after
from prunekit.compensate.teacher import Teacher
from prunekit.ops.quick import quick_products
from prunekit.stats import NeuronStats


@quick_products()
@torch.no_grad()
def rehearse(
    model: nn.Module,
    views: Sequence[MLPView],
    kept: Sequence[torch.Tensor],
    stats: NeuronStats,
    *,
    quiet: bool = False,
) -> float:
    """How far from the dense model the repaired one would be, on prompts that repair nothing.

    One batch of prompts in five is left out of the repair, and is asked after it.

    Args:
        model, views, kept, stats, quiet: as `sequential` takes them.

    Returns:
        The mean over the tokens of completions, of plain text over all, of
        KL(dense ‖ pruned) of the next token, in nats; each token weighs as its prompt does.
        0 where no prompt that was left out has a token to score.

    Raises:
        InputError: as `sequential`.

    Cost:
        That of `sequential`, and the lm_head's for a fifth of the tokens, twice.
    """
    with walked(model, views, kept, stats, whole=False, quiet=quiet) as walk:
        held_out = range(0, len(walk.groups), HELD_OUT)
        teacher = Teacher(stats.prompts)
        total = weight = 0.0
        for b in held_out:
            batch = walk.groups[b]
            teacher.hear(batch, logits_after(model, walk.layers, batch, walk.dense[b]))
            logits = logits_after(model, walk.layers, batch, walk.pruned[b])
            found, counted = teacher.divergence_from(logits, batch)
            total, weight = total + found, weight + counted
        return total / weight if weight else 0.0
