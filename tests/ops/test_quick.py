"""A model whose products go by `linear` and `attention`, and is itself again after."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.ops import attention, linear, quick
from prunekit.ops.linear import LEAST_ROWS
from prunekit.ops.quick import quick_products

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[False, True], ids=["without", "with"])
def instructions(request, monkeypatch):
    """Products as on a CPU without instructions for 16-bit weights, and as on one with them."""
    for module in (linear, attention, quick):
        monkeypatch.setattr(
            module, "multiplies", lambda dtype: request.param or dtype not in HALVES
        )
    return request.param


def test_linears_are_quick_inside_and_torchs_own_after(instructions, monkeypatch):
    widened = []
    original = linear._widened
    monkeypatch.setattr(linear, "_widened", lambda *args: widened.append(1) or original(*args))
    layer, before = nn.Linear(33, 21).bfloat16(), nn.Linear.forward
    x = torch.randn(LEAST_ROWS, 33).bfloat16()
    with torch.no_grad(), quick_products():
        found = layer(x)
        layer(x[: LEAST_ROWS - 1])
        layer.float()(x.float())
    assert len(widened) == (0 if instructions else 1)
    assert nn.Linear.forward is before
    layer.bfloat16()
    torch.testing.assert_close(found, layer(x))
    with pytest.raises(RuntimeError), quick_products():
        layer(torch.randn(5, 7).bfloat16())
    assert nn.Linear.forward is before


def test_attention_is_quick_inside_and_torchs_own_after(instructions):
    with quick_products():
        assert (F.scaled_dot_product_attention is attention.attention) is not instructions
    assert F.scaled_dot_product_attention is attention.torchs_own
