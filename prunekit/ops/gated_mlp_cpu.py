"""The gated MLP on the CPU: a C++ kernel for a few tokens, torch's own products for more."""

from __future__ import annotations

import torch

from prunekit.ops.registry import LIBRARY, OPERATIONS

# For how many tokens the CPU's decode kernel beats torch's products (`python -m bench.decode`, on
# AVX-512 with two threads); it takes 16 at the most.
DECODE_TOKENS = {
    torch.bfloat16: range(1, 3),
    torch.float16: range(1, 4),
    torch.float32: range(4, 17),
}

ARGUMENTS = (
    "(Tensor x, Tensor gate, Tensor? up, Tensor down, Tensor? gate_bias, Tensor? up_bias, "
    "Tensor? down_bias, int act) -> Tensor"
)
LIBRARY.define("gated_mlp_decode" + ARGUMENTS)  # served by the C++ extension alone


def decodes(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether the CPU's decode kernel serves: few tokens, of its dtypes, rows it can stream."""
    tokens = x.numel() // max(x.shape[-1], 1)
    served = DECODE_TOKENS.get(x.dtype, range(0))
    # Comparisons, which torch.compile can follow where the number of tokens is symbolic.
    return served.start <= tokens < served.stop and all(
        w is None or (w.dtype == x.dtype and w.stride(-1) == 1) for w in weights
    )


def gated_mlp_cpu(x, gate, up, down, gate_bias, up_bias, down_bias, act) -> torch.Tensor:
    """Decode through the C++ kernel where it is faster, all else through torch's own products."""
    if not decodes(x, gate, up, down, gate_bias, up_bias, down_bias):
        reference = OPERATIONS["gated_mlp"].reference
        return reference(x, gate, up, down, gate_bias, up_bias, down_bias, act)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.ops.prunekit.gated_mlp_decode.default(
        rows, gate, up, down, gate_bias, up_bias, down_bias, act
    )
    return y.view(*x.shape[:-1], down.shape[0])
