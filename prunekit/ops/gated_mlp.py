"""A whole compact MLP as one operation: gate and up products, activation, down product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prunekit.ops.activations import activate, activation_code
from prunekit.ops.gated_mlp_cpu import ARGUMENTS, by_products, decode, decodes, decodes_directly
from prunekit.ops.registry import LIBRARY, define, forced_backend

Optional = torch.Tensor | None


def gated_mlp_ref(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    down_bias: Optional,
    act: int,
) -> torch.Tensor:
    h = activate(F.linear(x, gate, gate_bias), act)
    if up is not None:
        h = h * F.linear(x, up, up_bias)
    return F.linear(h, down, down_bias)


def _gated_mlp_fake(x, gate, up, down, gate_bias, up_bias, down_bias, act):
    return x.new_empty((*x.shape[:-1], down.shape[0]))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    """Recompute the forward and differentiate it: nothing of width F is kept between the passes."""
    x, gate, up, down, gate_bias, up_bias, _ = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:-1])
    found = iter(
        torch.ops.prunekit.gated_mlp_backward.default(
            grad, x, gate, up, down, gate_bias, up_bias, ctx.act, needed
        )
    )
    return (*(next(found) if wanted else None for wanted in needed), None)


define("gated_mlp" + ARGUMENTS, reference=gated_mlp_ref, fake=_gated_mlp_fake)
torch.library.register_autograd(
    "prunekit::gated_mlp", _backward, setup_context=_save_for_backward, lib=LIBRARY
)


def check_shapes(
    name: str, x: torch.Tensor, gate: torch.Tensor, up: Optional, down: torch.Tensor
) -> None:
    """Raise ValueError unless the weights fit x and one another."""
    width, hidden = gate.shape
    if (
        x.shape[-1] != hidden
        or down.shape[1] != width
        or (up is not None and up.shape != gate.shape)
    ):
        raise ValueError(
            f"{name}: x [..., {x.shape[-1]}] does not fit gate {tuple(gate.shape)}, "
            f"up {None if up is None else tuple(up.shape)}, down {tuple(down.shape)}"
        )


def gated_mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    *,
    gate_bias: Optional = None,
    up_bias: Optional = None,
    down_bias: Optional = None,
    act: str = "silu",
) -> torch.Tensor:
    """Apply down(act(gate(x))·up(x)), or down(act(gate(x))) for a plain MLP; differentiable.

    Args:
        x: [..., D], bf16/fp16/fp32/fp64.
        gate: [F, D], x's dtype.
        up: [F, D], or None for a plain MLP.
        down: [D, F].
        gate_bias, up_bias: [F] or None. down_bias: [D] or None.
        act: silu, gelu, gelu_tanh, relu or relu2.

    Returns:
        [..., D], x's dtype.

    Raises:
        ValueError: the activation is unknown or the weights' shapes do not fit x.

    Cost:
        6·T·D·F FLOP; at least 3·D·F·b bytes, which is what bounds decoding.
    """
    tensors = x, gate, up, down, gate_bias, up_bias, down_bias
    code = activation_code(act)
    on_cpu = x.is_cpu and forced_backend() is None
    decoding = on_cpu and decodes(*tensors)
    if decoding and decodes_directly(x):
        return decode(*tensors, code)  # which checks the shapes itself
    check_shapes("gated_mlp", x, gate, up, down)
    if on_cpu and not decoding:
        return by_products(*tensors, code)  # what would serve, without the way there
    return torch.ops.prunekit.gated_mlp.default(*tensors, code)
