"""What the one calibration of a sweep has to gather for all of its cells."""

from __future__ import annotations

from prunekit.criteria.auto import gathered_for
from prunekit.experiment.cells import Cell, cells_of
from prunekit.experiment.protocol import Protocol
from prunekit.stats import NeuronStats


def gathered(protocol: Protocol) -> dict[str, bool] | None:
    """What the one calibration gathers for all cells; None where none is needed."""
    cells = cells_of(protocol)[1:]
    informed = [c for c in cells if c.criterion != "random" or c.compensate != "none"]
    if not informed:
        return None
    needs = {name for c in informed for name in gathered_for(c.criterion, repaired=solves(c))}
    return {
        "gram": any(map(solves, informed)) or "gram" in needs,
        "gradients": "gradient_gram" in needs,
        "taylor": "taylor" in needs,
    }


def suffices(stats: NeuronStats, wanted: dict[str, bool]) -> bool:
    """Whether statistics hold what cells need that were added to the protocol since."""
    sums = {"gram": "gram", "gradients": "gradient_gram", "taylor": "taylor"}
    return all(
        stats.target[0].held(sums[name]) is not None for name, needed in wanted.items() if needed
    )


def solves(cell: Cell) -> bool:
    """Whether the repair of a cell solves for the down projections, from Gram matrices."""
    return cell.compensate not in ("none", "bias")
