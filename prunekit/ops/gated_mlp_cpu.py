"""The gated MLP on the CPU: a C++ kernel for a few tokens, torch's own products for more."""

from __future__ import annotations

from functools import cache

import torch

from prunekit.ops.activations import activate
from prunekit.ops.linear import linear
from prunekit.ops.registry import LIBRARY

# Up to how many tokens the decode kernel, which takes 16 at the most, beats torch's products kept
# to the same instruction set: by instruction set, where one was measured, with two threads.
DECODE_TOKENS = {"amx_bf16": 16, "avx512_bf16": 16, "avx512": 16, "avx2": 16}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ARGUMENTS = (
    "(Tensor x, Tensor gate, Tensor? up, Tensor down, Tensor? gate_bias, Tensor? up_bias, "
    "Tensor? down_bias, int act) -> Tensor"
)
LIBRARY.define("gated_mlp_decode" + ARGUMENTS)  # served by the C++ extension alone


# Looked up once: finding an operator by its names takes as long as several checks below.
_decode = torch.ops.prunekit.gated_mlp_decode.default


@cache
def _served_here() -> dict[torch.dtype, int]:
    from prunekit.ops.isa import cpu_isa  # which needs the extension, which is loaded after this

    return dict.fromkeys(_DTYPES, DECODE_TOKENS.get(cpu_isa(), 0))


def _most_tokens(dtype: torch.dtype) -> int:
    """Up to how many tokens go to the decode kernel."""
    return _served_here().get(dtype, 0)


# What torch.compiler.assume_constant_result does; itself it imports the compiler, in two seconds.
_most_tokens._dynamo_marked_constant = True


def _rows_lie_together(weight: torch.Tensor) -> bool:
    return weight.is_contiguous() or weight.stride(-1) == 1


def decodes(x, gate, up, down, gate_bias, up_bias, down_bias) -> bool:
    """Whether the CPU's decode kernel serves: few tokens, of its dtypes, rows it can stream.

    A layer asks this at every token, while the weights wait: it reads as little as it can.
    """
    dtype, hidden = x.dtype, gate.shape[1]
    return (
        # Comparisons, which torch.compile can follow where the number of tokens is symbolic.
        0 < hidden <= x.numel() <= _most_tokens(dtype) * hidden
        and gate.dtype is dtype
        and down.dtype is dtype
        and (up is None or (up.dtype is dtype and _rows_lie_together(up)))
        and _rows_lie_together(gate)
        and _rows_lie_together(down)
        and (gate_bias is None or gate_bias.dtype is dtype)
        and (up_bias is None or up_bias.dtype is dtype)
        and (down_bias is None or down_bias.dtype is dtype)
    )


def decodes_directly(x: torch.Tensor) -> bool:
    """Whether the dispatcher has nothing to do for x but find the CPU's kernel: it takes 10 µs."""
    return (
        type(x) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def decode(x, gate, up, down, gate_bias, up_bias, down_bias, act) -> torch.Tensor:
    """What `decodes` said that the kernel serves."""
    return _decode(x.contiguous(), gate, up, down, gate_bias, up_bias, down_bias, act)


def gated_mlp_cpu(x, gate, up, down, gate_bias, up_bias, down_bias, act) -> torch.Tensor:
    """Decode through the C++ kernel where it is faster, all else through torch's own products."""
    if decodes(x, gate, up, down, gate_bias, up_bias, down_bias):
        return decode(x, gate, up, down, gate_bias, up_bias, down_bias, act)
    return by_products(x, gate, up, down, gate_bias, up_bias, down_bias, act)


def by_products(x, gate, up, down, gate_bias, up_bias, down_bias, act) -> torch.Tensor:
    """One product after the other."""
    h = activate(linear(x, gate, gate_bias), act)
    if up is not None:
        h = h * linear(x, up, up_bias)
    return linear(h, down, down_bias)
