"""The activations as device functions, and their derivatives, against torch in fp64."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from prunekit.ops.activations import NAMES, activate
from prunekit_kernels import activations
from tests.kernels.device import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or a GPU",
    ),
    # exp(-x) of a very negative x is infinite, and 1 over it the right zero; numpy remarks on it.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

LARGE = [-1e18, -1e4, -100.0, -30.0, -11.0, 11.0, 30.0, 100.0, 1e4, 1e18]


@triton.jit
def _cdf_kernel(x, y, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    value = tl.load(x + places, mask=inside, other=0.0)
    tl.store(y + places, activations.normal_cdf(value), mask=inside)


@triton.jit
def _apply_kernel(x, y, slope, count, ACT: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    value = tl.load(x + places, mask=inside, other=0.0)
    tl.store(y + places, activations.activate(value, ACT), mask=inside)
    tl.store(slope + places, activations.activate_grad(value, ACT), mask=inside)


def apply(x, name):
    y, slope = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
    grid = (triton.cdiv(len(x), 1024),)
    _apply_kernel[grid](x, y, slope, len(x), NAMES.index(name), 1024, enable_fp_fusion=True)
    return y, slope


def autograd(x, name, dtype=torch.float64):
    x = x.to(dtype, copy=True).requires_grad_()
    y = activate(x, NAMES.index(name))
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_normal_cdf():
    x = torch.cat([torch.linspace(-9, 9, 60_001), torch.logspace(-30, 38, 701)]).to(DEVICE)
    x = torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf, torch.nan], device=DEVICE)])
    y = torch.full_like(x, 7.0)
    _cdf_kernel[(triton.cdiv(len(x), 4096),)](x, y, len(x), 4096, enable_fp_fusion=True)
    assert y[-1].isnan()
    x, y = x[:-1].double(), y[:-1].double()
    # The last place of fp32 is 6e-8 below 1.
    right = 0.5 * (1.0 + torch.erf(x / 2**0.5))
    assert (y - right).abs().max() < 1e-7
    assert ((y >= 0) & (y <= 1)).all()
    # GELU multiplies the tail by x: it must not vanish early, nor come back beyond the fit.
    tail = (x < 0) & (x > -6)
    right = 0.5 * torch.erfc(-x[tail] / 2**0.5)
    assert ((y[tail] - right).abs() / right).max() < 1e-4
    assert y[x < -6].max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_activations(name):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 1, 300)]).to(DEVICE)
    x = torch.cat([x, -x])
    exact, torchs = autograd(x, name), autograd(x, name, torch.float32)
    for found, right, other in zip(apply(x, name), exact, torchs, strict=True):
        size = 1.0 + right.abs()
        torch_error = ((other.double() - right).abs() / size).max()
        assert ((found.double() - right).abs() / size).max() <= 2 * torch_error + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_large(name):
    x = torch.tensor(LARGE, device=DEVICE)
    for found, right in zip(apply(x, name), autograd(x, name), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_zero_and_nan(name):
    x = torch.tensor([0.0, -0.0, float("nan")], device=DEVICE)
    y, slope = apply(x, name)
    right_y, right_slope = autograd(x[:2], name)
    assert torch.equal(y[:2].double(), right_y)
    assert torch.equal(slope[:2].double(), right_slope)
    assert y[2].isnan()
    assert slope[2].isnan()
