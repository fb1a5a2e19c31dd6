"""The gated MLP in Triton: which of its kernels serve a shape."""

from __future__ import annotations

import torch

from prunekit_kernels.gated_mlp_decode import MOST_TOKENS, gated_mlp_decode
from prunekit_kernels.gated_mlp_prefill import gated_mlp_prefill
from prunekit_kernels.launch import architecture
from prunekit_kernels.tuning import Config, choose

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CANDIDATES: dict[str, list[Config]] = {
    "gated_mlp": [{"PATH": "decode"}, {"PATH": "prefill"}, {"PATH": "torch"}],
    "gated_mlp_stats": [{"PATH": "prefill"}, {"PATH": "torch"}],
    "gated_mlp_backward": [{"PATH": "triton"}, {"PATH": "torch"}],
}

Optional = torch.Tensor | None


def _cublas_leads(arch: str, dtype: torch.dtype) -> bool:
    """Whether torch's products serve better than those in Triton, as measured on an H200 in bf16.

    There the one kernel of gate and up won 6 to 8 % at 4096 tokens of hidden size 1536, and nothing
    at 3584 and 4096 or with fewer tokens; and its descriptors cost the host 0.4 ms a layer, which
    the rest of such a model does not hide.
    """
    return arch == "sm_90" and dtype.itemsize == 2


def path(x: torch.Tensor, gate: torch.Tensor) -> str:
    """Return what serves a shape: decode, prefill, or torch where torch was measured faster.

    Args:
        x: [T, D]. gate: [F, D].
    """
    tokens, hidden = x.shape
    arch = architecture(x.device)
    many = "torch" if _cublas_leads(arch, x.dtype) else "prefill"
    default = {"PATH": "decode" if tokens <= MOST_TOKENS else many}
    chosen = choose("gated_mlp", arch, x.dtype, tokens, hidden, gate.shape[0], default=default)
    if chosen["PATH"] == "decode" and tokens > MOST_TOKENS:
        return "prefill"
    return str(chosen["PATH"])


def stats_path(x: torch.Tensor, gate: torch.Tensor) -> str:
    """Return what serves the MLP with statistics: prefill (one kernel), or torch's products.

    Between torch's products the activation's kernel takes the statistics, which on an H200 costs
    what torch's activation alone does; in the product's own kernel they cost half as much again.
    """
    shape = x.shape[0], x.shape[1], gate.shape[0]
    arch = architecture(x.device)
    default = {"PATH": "torch" if _cublas_leads(arch, x.dtype) else "prefill"}
    return str(choose("gated_mlp_stats", arch, x.dtype, *shape, default=default)["PATH"])


def backward_path(x: torch.Tensor, gate: torch.Tensor) -> str:
    """Return what serves the gradients: triton, or torch's products over what Triton rebuilds."""
    arch = architecture(x.device)
    default = {"PATH": "torch" if _cublas_leads(arch, x.dtype) else "triton"}
    shape = x.shape[0], x.shape[1], gate.shape[0]
    return str(choose("gated_mlp_backward", arch, x.dtype, *shape, default=default)["PATH"])


def gated_mlp_triton(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    down_bias: Optional,
    act: int,
) -> torch.Tensor:
    """Compute down(act(gate(x))·up(x)) by the decode kernels or the prefill kernels.

    Args:
        x: [T, D], bf16/fp16/fp32; gate and up [F, D], up or None; down [D, F]; biases or None; all
            of one dtype, unit stride along rows.
        act: an activation's code.

    Returns:
        [T, D], x's dtype.

    Raises:
        ValueError: the dtype is not supported.
    """
    serve = gated_mlp_decode if path(x, gate) == "decode" else gated_mlp_prefill
    return serve(x, gate, up, down, gate_bias, up_bias, down_bias, act)
