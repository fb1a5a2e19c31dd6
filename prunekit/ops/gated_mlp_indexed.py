"""The gated MLP over some neurons of dense weights: what a plan would give, without compacting."""

from __future__ import annotations

import torch

from prunekit.ops.activations import activation_code
from prunekit.ops.gated_mlp import check_shapes, gated_mlp_ref
from prunekit.ops.registry import call, define

Optional = torch.Tensor | None


def gated_mlp_indexed_ref(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    index: torch.Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    down_bias: Optional,
    act: int,
) -> torch.Tensor:
    def kept(tensor: Optional, axis: int = 0) -> Optional:
        return None if tensor is None else tensor.index_select(axis, index)

    compact = kept(gate), kept(up), kept(down, 1), kept(gate_bias), kept(up_bias)
    return gated_mlp_ref(x, *compact, down_bias, act)


def _gated_mlp_indexed_fake(x, gate, up, down, index, gate_bias, up_bias, down_bias, act):
    return x.new_empty((*x.shape[:-1], down.shape[0]))


define(
    "gated_mlp_indexed(Tensor x, Tensor gate, Tensor? up, Tensor down, Tensor index, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, int act) -> Tensor",
    reference=gated_mlp_indexed_ref,
    fake=_gated_mlp_indexed_fake,
)


def gated_mlp_indexed(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    index: torch.Tensor,
    *,
    gate_bias: Optional = None,
    up_bias: Optional = None,
    down_bias: Optional = None,
    act: str = "silu",
) -> torch.Tensor:
    """Apply `gated_mlp` over the neurons that index names; to decode on a GPU no weight is copied.

    Args:
        x: [..., D], bf16/fp16/fp32/fp64.
        gate, up: [F, D], dense; up None for a plain MLP.
        down: [D, F], dense.
        index: [K], int32 or int64, each in [0, F) and none twice, on x's device; a GPU kernel does
            not check it. Weights that it does not name must be finite.
        gate_bias, up_bias: [F] or None. down_bias: [D] or None.
        act: silu, gelu, gelu_tanh, relu or relu2.

    Returns:
        [..., D], x's dtype. No gradient flows through it.

    Raises:
        ValueError: the activation is unknown, the weights' shapes do not fit x, or index is no
            vector of integers.

    Cost:
        6·T·D·K FLOP; 2·K·D·b bytes of gate and up, and all of down's D·F·b, for kept columns lie in
        nearly every 32-byte sector. On the CPU, and for more than 16 tokens on a GPU, the kept
        weights are copied first.
    """
    check_shapes("gated_mlp_indexed", x, gate, up, down)
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"gated_mlp_indexed: index must be a vector of int32 or int64, got {index.dtype} with "
            f"{index.dim()} dimensions; call .to(torch.int64)"
        )
    biases = gate_bias, up_bias, down_bias
    return call("gated_mlp_indexed", x, gate, up, down, index, *biases, activation_code(act))
