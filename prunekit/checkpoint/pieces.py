"""Parameters put together from runs of neurons that lie on disk in another order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prunekit.errors import InputError
from prunekit.tensors import Entry


@dataclass(frozen=True)
class Piece:
    """A run of neurons as it is stored, one a row, and what brings it into the model's own order.

    Attributes:
        entry: its rows.
        rank: which of them comes when, int64; None where they lie in order.
        rows: whether neurons are rows of the parameter too, and not its columns.
        inside: whether it is an MLP's.
    """

    entry: Entry
    rank: torch.Tensor | None = None
    rows: bool = True
    inside: bool = False

    def read(self) -> torch.Tensor:
        """The run as it lies in the parameter."""
        stored = self.entry.read()
        ordered = stored if self.rank is None else stored[self.rank]
        return ordered if self.rows else ordered.T


@dataclass(frozen=True)
class Assembled:
    """A parameter made of pieces: a fused gate and up has two."""

    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(piece.entry.size for piece in self.pieces)

    def read(self) -> torch.Tensor:
        """The parameter, in memory of its own.

        Raises:
            InputError: its pieces are not of one shape.
        """
        read = [piece.read() for piece in self.pieces]
        try:
            return (torch.cat(read) if len(read) > 1 else read[0]).contiguous()
        except RuntimeError:
            entry = self.pieces[0].entry
            raise InputError(f"{entry.path}: {entry.name} does not fit its other half") from None
