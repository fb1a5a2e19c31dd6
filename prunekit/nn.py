"""`CompactMLP`: a drop-in MLP whose forward is one operation."""

from __future__ import annotations

import torch
from torch import nn

from prunekit import ops
from prunekit.arch import MLPView


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module does nothing but multiply by its weight and add its bias."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return type(module) is nn.Linear and not hooked and "forward" not in vars(module)


class CompactMLP(nn.Module):
    """An MLP of a transformer, computed by `ops.gated_mlp`, around the model's own projections.

    The projections stay the modules they were, under the names they had, so state dicts, PEFT's
    target names and hooks go on working: where a projection is more than a bare Linear (an adapter
    around it, a hook on it, weights offloaded), the projections are called one by one instead.

    Args:
        view: an MLP found by `arch.find_mlps`, of kind gated, fused or plain.

    Attributes:
        kept: [K], int32 or int64, the neurons to compute with; None (the default) takes them all.
            Nothing is removed, and no gradient flows while it is set.
    """

    def __init__(self, view: MLPView):
        super().__init__()
        for name, child in view.module.named_children():
            self.add_module(name, child)
        self._kind, self._act = view.kind, view.act
        names = {id(child): name for name, child in view.module.named_children()}
        self._gate = names[id(view.slots["gate"].owner)]
        self._up = names[id(view.slots["up"].owner)] if "up" in view.slots else None
        self._down = names[id(view.slots["down"].owner)]
        self.register_buffer("kept", None, persistent=False)

    @property
    def intermediate_size(self) -> int:
        """F', the number of neurons."""
        return getattr(self, self._down).in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the MLP: [..., D] -> [..., D]."""
        modules = self._modules  # read at every token: getattr takes several times as long
        gate, down = modules[self._gate], modules[self._down]
        up = modules[self._up] if self._up else None
        if not all(map(is_bare, (gate, down) if up is None else (gate, up, down))):
            return self._call_projections(x)
        if self._kind == "plain":
            up_weight = up_bias = None
            gate_weight, gate_bias = gate.weight, gate.bias
        elif self._kind == "fused":
            gate_weight, up_weight = gate.weight.chunk(2)
            gate_bias, up_bias = (None, None) if gate.bias is None else gate.bias.chunk(2)
        else:
            gate_weight, gate_bias, up_weight, up_bias = gate.weight, gate.bias, up.weight, up.bias
        biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down.bias}
        weights = gate_weight, up_weight, down.weight
        if self.kept is not None:
            return ops.gated_mlp_indexed(x, *weights, self.kept, **biases, act=self._act)
        return ops.gated_mlp(x, *weights, **biases, act=self._act)

    def _call_projections(self, x: torch.Tensor) -> torch.Tensor:
        gate = getattr(self, self._gate)(x)
        up = None
        if self._kind == "fused":
            gate, up = gate.chunk(2, dim=-1)
        elif self._up is not None:
            up = getattr(self, self._up)(x)
        h = ops.ACTIVATIONS[self._act](gate)
        h = h if up is None else h * up
        if self.kept is not None:
            h = torch.zeros_like(h).index_copy(-1, self.kept.long(), h[..., self.kept])
        return getattr(self, self._down)(h)

    def extra_repr(self) -> str:
        return f"kind={self._kind}, act={self._act}, intermediate_size={self.intermediate_size}"
