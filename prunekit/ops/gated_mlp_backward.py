"""The gradients of a whole gated MLP, as one operation that keeps nothing of width F between."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prunekit.ops.activations import activate, activate_backward
from prunekit.ops.registry import define

Optional = torch.Tensor | None


def gated_mlp_backward_ref(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    act: int,
    needed: list[bool],
) -> list[torch.Tensor]:
    """Return the gradients that are needed of (x, gate, up, down, and the three biases), in order.

    Args:
        grad: [..., D], the loss's gradient by the MLP's output; the others as in `gated_mlp`.
        needed: seven, in that order; False for what the MLP has not.

    Cost:
        18·T·D·F FLOP: the two products recomputed, and six of the gradients.
    """
    dy, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    g = F.linear(rows, gate, gate_bias)
    a = activate(g, act)
    dh = dy @ down
    if up is None:
        h, dg, du = a, activate_backward(dh, g, act), None
    else:
        u = F.linear(rows, up, up_bias)
        h, dg, du = a * u, activate_backward(dh * u, g, act), dh * a

    def of_x() -> torch.Tensor:
        dx = dg @ gate
        return (dx if du is None else dx + du @ up).view(x.shape)

    gradients = (
        of_x,
        lambda: dg.T @ rows,
        lambda: du.T @ rows,
        lambda: dy.T @ h,
        lambda: dg.sum(0),
        lambda: du.sum(0),
        lambda: dy.sum(0),
    )
    return [gradient() for gradient, wanted in zip(gradients, needed, strict=True) if wanted]


def _gated_mlp_backward_fake(grad, x, gate, up, down, gate_bias, up_bias, act, needed):
    width, hidden = gate.shape
    shapes = (x.shape, gate.shape, gate.shape, down.shape, (width,), (width,), (hidden,))
    return [x.new_empty(shape) for shape, wanted in zip(shapes, needed, strict=True) if wanted]


define(
    "gated_mlp_backward(Tensor grad, Tensor x, Tensor gate, Tensor? up, Tensor down, "
    "Tensor? gate_bias, Tensor? up_bias, int act, bool[] needed) -> Tensor[]",
    reference=gated_mlp_backward_ref,
    fake=_gated_mlp_backward_fake,
)
