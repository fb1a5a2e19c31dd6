"""auto: the criterion that measures best with what was gathered."""

from __future__ import annotations

import torch

from prunekit.criteria.reconstruction import reconstruction_fisher
from prunekit.criteria.registry import CRITERIA, Evidence, criterion
from prunekit.criteria.wanda import wanda
from prunekit.stats import NeuronStats, NeuronSums

AUTO = "auto"


@criterion(AUTO)
def auto(evidence: Evidence) -> torch.Tensor:
    """reconstruction_fisher where the Gram and gradient matrices were gathered, else wanda.

    What reconstruction_fisher leaves is only good once repaired: with a repair it loses least (see
    `bench/quality.py`), without one wanda does, which `resolved` knows and scores alone cannot.

    Cost:
        That of the criterion chosen.
    """
    return (reconstruction_fisher if _has_all(evidence.target) else wanda)(evidence)


def resolved(name: str, stats: NeuronStats | None, *, repaired: bool) -> str:
    """The name of the criterion that ``auto`` stands for; any other name as it is.

    Args:
        name: a criterion.
        stats: what it will score from.
        repaired: whether the down projections will be solved anew afterwards.
    """
    if name != AUTO:
        return name
    complete = stats is not None and all(map(_has_all, stats.target))
    return "reconstruction_fisher" if repaired and complete else "wanda"


def gathered_for(name: str, *, repaired: bool) -> tuple[str, ...]:
    """What a calibration should gather beyond its plain sums for a criterion to do its best."""
    best = "reconstruction_fisher" if name == AUTO and repaired else name
    return CRITERIA[best].gathers


def _has_all(sums: NeuronSums) -> bool:
    return all(sums.held(n) is not None for n in CRITERIA["reconstruction_fisher"].gathers)
