"""A gated MLP's output and its neurons' statistics together: calibration at a forward's price."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prunekit.ops.activations import activation_code
from prunekit.ops.gated_act_stats import check_spans, gated_act_stats_ref
from prunekit.ops.gated_mlp import check_shapes
from prunekit.ops.linear import linear
from prunekit.ops.registry import call, define

Optional = torch.Tensor | None
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def gated_mlp_stats_ref(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    down_bias: Optional,
    spans: torch.Tensor,
    act: int,
) -> Outputs:
    g = F.linear(x, gate, gate_bias)
    u = None if up is None else F.linear(x, up, up_bias)
    h, prompt_stats, token_stats = gated_act_stats_ref(g, u, spans, act)
    return F.linear(h, down, down_bias), h, prompt_stats, token_stats


def gated_mlp_stats_composed(
    x, gate, up, down, gate_bias, up_bias, down_bias, spans, act
) -> Outputs:
    """torch's own products around the fused activation with its statistics."""
    g = linear(x, gate, gate_bias)
    u = None if up is None else linear(x, up, up_bias)
    h, prompt_stats, token_stats = call("gated_act_stats", g, u, spans, act)
    return linear(h, down, down_bias), h, prompt_stats, token_stats


def _gated_mlp_stats_fake(x, gate, up, down, gate_bias, up_bias, down_bias, spans, act):
    tokens, width = x.shape[0], gate.shape[0]
    return (
        x.new_empty((tokens, down.shape[0])),
        x.new_empty((tokens, width)),
        x.new_empty((2, spans.shape[0], width), dtype=torch.float32),
        x.new_empty((3, width), dtype=torch.float32),
    )


define(
    "gated_mlp_stats(Tensor x, Tensor gate, Tensor? up, Tensor down, Tensor? gate_bias, "
    "Tensor? up_bias, Tensor? down_bias, Tensor spans, int act) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=gated_mlp_stats_ref,
    fake=_gated_mlp_stats_fake,
)


def gated_mlp_stats(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    spans: torch.Tensor,
    *,
    gate_bias: Optional = None,
    up_bias: Optional = None,
    down_bias: Optional = None,
    act: str = "silu",
) -> Outputs:
    """Apply a gated MLP, and take the statistics of its h on the way.

    On a GPU one kernel computes both products, the activation and the statistics, so gate and up
    activations never reach memory. Its count of open gates looks at the fp32 product, where
    `gated_act_stats` can only see it rounded: a gate that rounds to 0 may differ.

    Args:
        x: [T, D], bf16/fp16/fp32/fp64.
        gate, up: [F, D]; up None for a plain MLP. down: [D, F].
        spans: [P, 2], int64, on the CPU: each prompt's rows, as in `gated_act_stats`.
        gate_bias, up_bias: [F] or None. down_bias: [D] or None.
        act: silu, gelu, gelu_tanh, relu or relu2.

    Returns:
        y: [T, D]. h: [T, F], x's dtype. prompt_stats: [2, P, F] and token_stats: [3, F], fp32, as
        in `gated_act_stats`.

    Raises:
        ValueError: the activation is unknown, the weights' shapes do not fit x, or spans overlap or
            run out of T.

    Cost:
        6·T·D·F FLOP; on a GPU about 20·F bytes for each 128 tokens more than the MLP alone.
    """
    if x.dim() != 2:
        raise ValueError(f"gated_mlp_stats: x must be [T, D], got {x.dim()} dimensions")
    check_shapes("gated_mlp_stats", x, gate, up, down)
    check_spans("gated_mlp_stats", spans, x.shape[0])
    biases = gate_bias, up_bias, down_bias
    return call("gated_mlp_stats", x, gate, up, down, *biases, spans, activation_code(act))
