"""What a plan is worth: a repair of which some prompts know nothing, and what it does to these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunekit.arch import MLPView
from prunekit.compensate.sequential import HELD_OUT, walked
from prunekit.compensate.streams import logits_after
from prunekit.compensate.teacher import Teacher, Verdict, counted
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
) -> Verdict:
    """What the repaired model would make of prompts that repair nothing.

    One batch of prompts in five is left out of the repair, and is asked after it.

    Args:
        model, views, kept, stats, quiet: as `sequential` takes them.

    Returns:
        The divergence from the dense model and the loss, means over the tokens that were asked, of
        which each weighs as its prompt does. All 0 where no prompt that was left out has a token to
        score.

    Raises:
        InputError: as `sequential`.

    Cost:
        That of `sequential`, and the lm_head's for a fifth of the tokens, twice.
    """
    with walked(model, views, kept, stats, whole=False, quiet=quiet) as walk:
        held_out = range(0, len(walk.groups), HELD_OUT)
        teacher = Teacher(stats.prompts)
        found = []
        for b in held_out:
            batch = walk.groups[b]
            teacher.hear(batch, logits_after(model, walk.layers, batch, walk.dense[b]))
            logits = logits_after(model, walk.layers, batch, walk.pruned[b])
            found.append(teacher.verdict(counted(logits, batch), batch))
        divergence, loss, weight = map(sum, zip(*found, strict=True))
        return Verdict(divergence / weight, loss / weight, weight) if weight else Verdict(0, 0, 0)
