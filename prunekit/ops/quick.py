"""Puts `linear` and `attention`, quicker on CPUs without 16-bit products, under a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.ops.attention import attention
from prunekit.ops.linear import linear, multiplies


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside, and in functions so decorated, every nn.Linear multiplies by `linear`, and
    attention is `attention`.

    Where this CPU gains nothing by it, nothing changes.
    """
    if multiplies(torch.bfloat16) and multiplies(torch.float16):
        yield
        return
    before = nn.Linear.forward, F.scaled_dot_product_attention
    nn.Linear.forward, F.scaled_dot_product_attention = _forward, attention
    try:
        yield
    finally:
        nn.Linear.forward, F.scaled_dot_product_attention = before


def _forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return linear(input, self.weight, self.bias)
