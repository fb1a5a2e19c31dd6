"""The registry of criteria, and `score`, which applies one to a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunekit.arch import MLPView, find_mlps
from prunekit.errors import InputError
from prunekit.stats import REMEDIES, NeuronStats, NeuronSums


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at for one MLP.

    Attributes:
        index: the MLP's position in the model.
        view: its parameters.
        target, distractor: its statistics; None where a class was not calibrated.
        seed: for criteria that draw.
    """

    index: int
    view: MLPView
    target: NeuronSums | None
    distractor: NeuronSums | None
    seed: int


@dataclass(frozen=True)
class Criterion:
    """A named scorer, and what it cannot do without.

    Attributes:
        needs: classes of statistics: "target", "distractor".
        gathers: those sums of the target that a calibration need not gather (`stats.REMEDIES`).
    """

    name: str
    score: Callable[[Evidence], torch.Tensor]
    needs: tuple[str, ...]
    gathers: tuple[str, ...] = ()


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, needs: tuple[str, ...] = ("target",), gathers: tuple[str, ...] = ()):
    """Register a function ``Evidence -> [F] scores`` under a name."""

    def register(function: Callable[[Evidence], torch.Tensor]):
        CRITERIA[name] = Criterion(name, function, needs, gathers)
        return function

    return register


def get_criterion(name: str) -> Criterion:
    """Look a criterion up by name.

    Raises:
        InputError: there is none of that name; lists those there are.
    """
    if name not in CRITERIA:
        raise InputError(f"criterion: got {name!r}; expected one of {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]


def _check_complete(scorer: Criterion, classes: dict[str, list[NeuronSums]]) -> None:
    for needed in scorer.needs:
        if needed not in classes:
            raise InputError(
                f"criterion {scorer.name}: needs {needed} statistics; "
                f"calibrate with --{needed} FILE"
            )
    for name in scorer.gathers:
        if any(sums.held(name) is None for sums in classes["target"]):
            raise InputError(
                f"criterion {scorer.name}: the statistics hold no {name}; {REMEDIES[name]}"
            )


@torch.no_grad()
def score(
    stats: NeuronStats | None, model: nn.Module, criterion: str = "auto", *, seed: int = 0
) -> list[torch.Tensor]:
    """Score every neuron of a model; higher means keep.

    Args:
        stats: from `calibrate` on this model; None for a criterion that needs none.
        model: the dense model.
        criterion: a name in `CRITERIA`.
        seed: for criteria that draw.

    Returns:
        One [F] tensor an MLP, fp32, on the CPU.

    Raises:
        InputError: unknown criterion, missing class of statistics or optional sums, statistics of
            another model, or a score that is not finite.
    """
    views = find_mlps(model)
    return score_views(stats, views, views, criterion, seed=seed)


@torch.no_grad()
def score_views(
    stats: NeuronStats | None,
    views: Sequence[MLPView],
    read: Iterable[MLPView],
    criterion: str,
    *,
    seed: int = 0,
) -> list[torch.Tensor]:
    """As `score`, of MLPs whose weights come one MLP at a time.

    Args:
        views: all MLPs, with or without weights.
        read: the same with weights, one after the other.
    """
    scorer = get_criterion(criterion)
    classes = stats.classes if stats is not None else {}
    _check_complete(scorer, classes)
    if stats is not None:
        stats.check_model(views)
    scores = []
    for i, view in enumerate(read):
        target, distractor = (
            classes[name][i] if name in classes else None for name in ("target", "distractor")
        )
        values = scorer.score(Evidence(i, view, target, distractor, seed)).float().cpu()
        if not torch.isfinite(values).all():
            raise InputError(f"criterion {criterion}: {view.name} has scores that are not finite")
        scores.append(values)
    return scores
