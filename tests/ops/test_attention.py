"""Attention whose gradients are computed in fp32 where 16-bit ones would be slow."""

import pytest
import torch

from prunekit.ops import attention as module
from prunekit.ops.attention import attention, torchs_own

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def widths(monkeypatch):
    """The dtypes that torch's own attention was called with, on a CPU without 16-bit products."""
    seen = []
    monkeypatch.setattr(module, "multiplies", lambda dtype: dtype not in HALVES)
    monkeypatch.setattr(
        module,
        "torchs_own",
        lambda q, *args, **named: seen.append(q.dtype) or torchs_own(q, *args, **named),
    )
    return seen


def operands(dtype, requires_grad=True):
    return [torch.randn(2, 3, 7, 8).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def masks(dtype):
    mask = torch.randn(7, 7)
    return {"none": None, "bool": mask.tril() != 0, "float": mask.to(dtype)}


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", HALVES)
def test_results_and_gradients_are_the_exact_ones_rounded(dtype, mask, widths):
    leaves, grad = operands(dtype), torch.randn(2, 3, 7, 8).to(dtype)
    chosen = masks(dtype)[mask]
    found = attention(*leaves, chosen)
    found.backward(grad)
    assert widths == [torch.float32]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = chosen.double() if mask == "float" else chosen
    want = torchs_own(*wide, exact)
    want.backward(grad.double())
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4}
    torch.testing.assert_close(found, want.to(dtype), **close)
    for leaf, precise in zip(leaves, wide, strict=True):
        assert leaf.grad.dtype is dtype
        torch.testing.assert_close(leaf.grad, precise.grad.to(dtype), **close)


def test_torchs_options_arrive(widths):
    q, k, v = operands(torch.bfloat16)
    few = k[:, :1], v[:, :1]
    found = attention(q, *few, is_causal=True, scale=0.5, enable_gqa=True)
    want = torchs_own(
        q.float(), *(t.float() for t in few), is_causal=True, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(found, want.bfloat16())
    assert widths == [torch.float32]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_where_no_gradient_is_wanted_torchs_own_serves(dtype, widths):
    found = attention(*operands(dtype, requires_grad=False), is_causal=True)
    with torch.no_grad():
        attention(*operands(dtype))
    assert found.dtype is dtype
    assert widths == [dtype, dtype]


def test_fp32_is_left_alone(widths):
    leaves = operands(torch.float32)
    torch.testing.assert_close(attention(*leaves), torchs_own(*leaves), rtol=0, atol=0)
    assert widths == [torch.float32]
