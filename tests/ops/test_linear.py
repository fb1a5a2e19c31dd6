"""`linear` on CPUs without products of 16-bit weights, and the products that go by it there."""

import pytest
import torch
import torch.nn.functional as F

from prunekit.ops import linear as module
from prunekit.ops.linear import linear, multiplies

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[False, True], ids=["without", "with"])
def instructions(request, monkeypatch):
    """Products as on a CPU without instructions for 16-bit weights, and as on one with them."""
    monkeypatch.setattr(module, "multiplies", lambda dtype: request.param or dtype not in HALVES)
    monkeypatch.setattr(module, "_BLOCK", 100)  # so that the tests' small weights take several
    return request.param


def operands(rows, dtype, bias=True):
    x = torch.randn(rows, 3, 33, dtype=dtype)
    weight, offset = torch.randn(21, 33, dtype=dtype), torch.randn(21, dtype=dtype)
    return x, weight, offset if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 40])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_linear_rounds_the_exact_product_once(instructions, dtype, rows, bias):
    x, weight, offset = operands(rows, dtype, bias)
    found = linear(x, weight, offset)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    torch.testing.assert_close(found, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert found.dtype is dtype
    assert found.shape == (rows, 3, 21)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_those_of_the_exact_product(instructions, dtype, bias):
    leaves = [t.requires_grad_() for t in operands(20, dtype, bias) if t is not None]
    grad = torch.randn(20, 3, 21, dtype=dtype)
    linear(*leaves).backward(grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    F.linear(*wide).backward(grad.double())
    for narrow, exact in zip(leaves, wide, strict=True):
        assert narrow.grad.dtype is dtype
        torch.testing.assert_close(
            narrow.grad, exact.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4
        )


def test_frozen_weights_get_no_gradient(instructions):
    x, weight, _ = operands(20, torch.bfloat16)
    linear(x.requires_grad_(), weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_compiled_linears_are_the_compilers_own(instructions):
    x, weight, bias = operands(20, torch.bfloat16)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


def test_every_cpu_multiplies_fp32():
    assert multiplies(torch.float32)
    assert multiplies(torch.float64)
