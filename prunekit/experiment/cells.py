"""Cells: the combinations that a protocol asks for, each once and in order."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from prunekit.experiment.protocol import Grid, Protocol
from prunekit.files import digest

DENSE = "dense"
_HARM = {"reverse": 0, "random": 1, "selective": 2, DENSE: 3}


@dataclass(frozen=True)
class Cell:
    """One model of a sweep.

    Attributes:
        strategy: of `plan`, or ``dense``.
        sparsity: asked for; 0 for the dense model.
        criterion: what scores; ``random`` where the strategy draws.
        compensate: the repair.
        seed: of what is drawn; else 0.
        recovery: the method by which it was trained after pruning; "" where it was not.
    """

    strategy: str
    sparsity: float = 0.0
    criterion: str = ""
    compensate: str = "none"
    seed: int = 0
    recovery: str = ""

    @property
    def pruned(self) -> Cell:
        """The cell before its recovery."""
        return replace(self, recovery="")

    def key(self, facts: dict[str, Any]) -> str:
        """A hash of what the result depends on: the facts of the study, and the cell."""
        return digest({"facts": facts, "cell": asdict(self)})


def cells_of(protocol: Protocol) -> list[Cell]:
    """Every cell of a protocol: the dense model, then the others as listed or the worst first.

    A cell that is trained afterwards comes right behind the one before it, so that one pruning
    serves both.
    """
    found: dict[Cell, None] = {}
    for grid in protocol.grids:
        method = protocol.recovery.settings().method if protocol.recovery else ""
        for cell in _combinations(grid):
            found[cell] = None
            if cell.sparsity in grid.recover_at:
                found[replace(cell, recovery=method)] = None
    groups: dict[Cell, list[Cell]] = {}
    for cell in found:
        groups.setdefault(cell.pruned, []).append(cell)
    order = list(groups)
    if protocol.order == "worst-first":
        order.sort(key=lambda c: (_HARM[c.strategy], c.compensate != "none", -c.sparsity))
    together = (sorted(groups[first], key=lambda c: c.recovery != "") for first in order)
    return [Cell(DENSE), *(cell for group in together for cell in group)]


def _combinations(grid: Grid):
    lists = grid.strategies, grid.criteria, grid.compensations, grid.sparsities, grid.seeds
    for strategy, criterion, compensate, sparsity, seed in product(*lists):
        criterion = "random" if strategy == "random" else criterion
        seed = seed if criterion == "random" else 0
        yield Cell(strategy, sparsity, criterion, compensate, seed)
