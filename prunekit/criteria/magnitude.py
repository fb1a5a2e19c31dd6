"""Weight magnitudes: what can be said of a neuron without any data."""

from __future__ import annotations

import torch

from prunekit.criteria.registry import Evidence, criterion


@criterion("magnitude_ppm", needs=())
def magnitude_ppm(evidence: Evidence) -> torch.Tensor:
    """Peak to peak magnitude: max + abs(min) of the gate row, plus the same of the up row.

    Without an up projection, of the one row that feeds the activation.

    Source:
        optipfair's PPM for gated MLPs ("MAW").
    """
    score = _peaks(evidence.view.gate)
    return score if evidence.view.up is None else score + _peaks(evidence.view.up)


def _peaks(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    return (rows.amax(dim=1) + rows.amin(dim=1).abs()).cpu()


@criterion("magnitude_l2", needs=())
def magnitude_l2(evidence: Evidence) -> torch.Tensor:
    """L2 norm of all the neuron's weights: gate row, up row and down column as one vector.

    Source:
        The group magnitude of DepGraph, Fang et al., arXiv 2301.12900, for this group, with p = 2.
    """
    view = evidence.view
    squares = view.gate.double().square().sum(1) + view.down.double().square().sum(0)
    if view.up is not None:
        squares = squares + view.up.double().square().sum(1)
    return squares.sqrt().cpu()
