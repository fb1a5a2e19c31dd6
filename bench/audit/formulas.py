"""The bytes that each kernel has to move, from the arguments and block sizes of its launch.

Streaming kernels move every tensor once. Tiled products read their factors once for each tile, as
their block sizes have it: from the cache or not, the formula does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

STREAMING = 1.05  # most of moved/ideal
PRODUCT = 1.15
SECTOR = 32  # bytes that memory moves at least

Arguments = Mapping[str, Any]


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Return the bytes of the tensors' own elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _once(a: Arguments) -> int:
    return nbytes(*(value for value in a.values() if isinstance(value, torch.Tensor)))


def _reduce_segments(a: Arguments) -> int:
    prompts, programs = a["prompts"], _blocks(a["width"], a["BLOCK_F"])
    bounds = 2 * a["of_prompt"].element_size() * 2 * prompts * programs  # each prompt's, twice
    return nbytes(a["partials"], a["prompt_stats"], a["token_stats"]) + bounds


def _tiles(a: Arguments, rows: int, columns: int, left: int, right: int) -> int:
    """Every tile reads its rows of the left factors and its columns of the right ones."""
    return _blocks(columns, a["BLOCK_N"]) * left + _blocks(rows, a["BLOCK_M"]) * right


def _dual_product(a: Arguments) -> int:
    x, gate, up, h = a["x"], a["gate"], a["up"], a["h"]
    moved = _tiles(a, *h.shape, nbytes(x), nbytes(gate, up)) + nbytes(h)
    if a["partials"] is not None:
        moved += nbytes(h, a["partials"])  # the statistics read h back
    return moved + nbytes(a["gate_bias"], a["up_bias"]) * _blocks(len(x), a["BLOCK_M"])


def _down_product(a: Arguments) -> int:
    h, down, y = a["h"], a["down"], a["y"]
    bias = nbytes(a["bias"]) * _blocks(len(h), a["BLOCK_M"])
    return _tiles(a, *y.shape, nbytes(h), nbytes(down)) + nbytes(y) + bias


def _decode_hidden(a: Arguments) -> int:
    index, again = a["index"], _blocks(a["kept"], a["BLOCK_R"])  # a block of rows reads all of x
    moved = _once(a) + (again - 1) * nbytes(a["x"])
    if index is not None:  # of gate, up and h only what it names
        width = len(a["gate"])
        moved -= nbytes(a["gate"], a["up"], a["h"]) * (width - a["kept"]) // width
    return moved


def _decode_down(a: Arguments) -> int:
    again = _blocks(len(a["down"]), a["BLOCK_R"])
    return _once(a) + (again - 1) * nbytes(a["h"])


def _gram_update(a: Arguments) -> int:
    gram, h, block = a["gram"], a["h"], a["BLOCK_F"]
    tokens, width = h.shape
    sizes = [min(block, width - low) for low in range(0, width, block)]
    moved = 0
    for column, wide in enumerate(sizes):
        for tall in sizes[: column + 1]:
            moved += (tall + wide) * tokens * h.element_size()
            moved += 2 * tall * wide * gram.element_size()
    return moved


def _backward_hidden(a: Arguments) -> int:
    left, right = nbytes(a["x"], a["grad_y"]), nbytes(a["gate"], a["up"], a["down"])
    written = nbytes(a["grad_gate"], a["grad_up"], a["h"])
    return _tiles(a, len(a["x"]), len(a["gate"]), left, right) + written


def _grad_x(a: Arguments) -> int:
    left, right = nbytes(a["grad_gate"], a["grad_up"]), nbytes(a["gate"], a["up"])
    return _tiles(a, *a["grad_x"].shape, left, right) + nbytes(a["grad_x"])


def _grad_weight(a: Arguments) -> int:
    return _tiles(a, *a["out"].shape, nbytes(a["a"]), nbytes(a["b"])) + nbytes(a["out"])


# By the kernel's name: what it has to move, and at most how much more it may.
FORMULAS: dict[str, tuple[Callable[[Arguments], int], float]] = {
    "gated_act_stats": (_once, STREAMING),
    "dual_product": (_dual_product, PRODUCT),
    "down_product": (_down_product, PRODUCT),
    "reduce_segments": (_reduce_segments, STREAMING),
    "decode_hidden": (_decode_hidden, STREAMING),
    "decode_down": (_decode_down, STREAMING),
    "decode_combine": (_once, STREAMING),
    "gram_update": (_gram_update, PRODUCT),
    "backward_hidden": (_backward_hidden, PRODUCT),
    "grad_x": (_grad_x, PRODUCT),
    "grad_weight": (_grad_weight, PRODUCT),
    "column_sums": (_once, STREAMING),
}
