"""Plans by what they are worth: where several are at hand, each is rehearsed and the best is taken.

Curves of the loss by width (`allocation`) are read off the dense model. What layers with other
widths are worth once repaired in turn, each making good what the earlier ones lost, only a repair
tells.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prunekit.allocation import Sensitivity
from prunekit.arch import find_mlps
from prunekit.compensate import default_method, rehearse
from prunekit.compensate.teacher import Verdict
from prunekit.plan import PrunePlan, plan
from prunekit.stats import NeuronStats

logger = logging.getLogger(__name__)

REHEARSED = ("sequential", "distill")


def planned(
    model: nn.Module,
    stats: NeuronStats | None,
    scores: Sequence[torch.Tensor],
    sparsity: float,
    *,
    compensate: str | None = None,
    allocation: str = "uniform",
    sensitivity: Sensitivity | None = None,
    quiet: bool = False,
    **options: Any,
) -> PrunePlan:
    """As `plan`, and budget allocation only where it is worth more than uniform.

    Where the repair is sequential (or goes on from it) budget's plan and uniform's are rehearsed
    (`choose`). Other repairs take budget's as it is.

    Args:
        model: dense.
        stats: of it.
        scores, sparsity, allocation, sensitivity, options: as `plan` takes them.
        compensate: the repair to come; None for what `prune` would take.
        quiet: no progress bar.

    Returns:
        The plan; where there was a choice its recipe says under ``rehearsed`` what either would
        make of the prompts left out: ``loss`` and ``divergence``.

    Raises:
        InputError: as `plan` and `choose`.
    """
    found = plan(scores, sparsity, allocation=allocation, sensitivity=sensitivity, **options)
    method = default_method(stats) if compensate is None else compensate
    if allocation != "budget" or method not in REHEARSED:
        return found
    even = plan(scores, sparsity, **options)
    if even.widths() == found.widths():
        return found
    best, verdicts = choose(model, [found, even], stats, quiet=quiet)
    said = {
        name: {"loss": verdict.loss, "divergence": verdict.divergence}
        for name, verdict in zip(("budget", "uniform"), verdicts, strict=True)
    }
    logger.info("on prompts left out: %s", said)
    return replace(best, recipe=found.recipe | {"rehearsed": said})


def choose(
    model: nn.Module, plans: Sequence[PrunePlan], stats: NeuronStats, *, quiet: bool = False
) -> tuple[PrunePlan, list[Verdict]]:
    """The plan whose model would be best, by loss and divergence from the dense one together.

    Args:
        model: dense; as it was on return.
        plans: for it; of equal ones the first is taken.
        stats: with Gram matrices and prompts.
        quiet: no progress bar.

    Returns:
        A plan, and what `rehearse` found of each.

    Raises:
        InputError: a plan is of another model, or as `rehearse`.

    Cost:
        A `rehearse` a plan.
    """
    views = find_mlps(model, verify=False)
    for each in plans:
        each.check_model(views)
    found = [rehearse(model, views, each.kept, stats, quiet=quiet) for each in plans]
    best = min(range(len(plans)), key=lambda i: found[i].mixed)
    return plans[best], found
