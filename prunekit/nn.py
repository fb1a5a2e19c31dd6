"""`CompactMLP`: a drop-in MLP whose forward is one operation."""

from __future__ import annotations

import torch
from torch import nn

from prunekit import ops
from prunekit.arch import MLPView


class CompactMLP(nn.Module):
    """An MLP of a transformer, computed by `ops.gated_mlp`, around the model's own projections.

    The projections stay the modules they were, under the names they had, so state dicts, PEFT's
    target names and hooks on the module go on working; hooks on the projections themselves do not
    fire, since their weights are read and not called.

    Args:
        view: an MLP found by `arch.find_mlps`, of kind gated, fused or plain.
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

    @property
    def intermediate_size(self) -> int:
        """F', the number of neurons."""
        return getattr(self, self._down).in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the MLP: [..., D] -> [..., D]."""
        gate, down = getattr(self, self._gate), getattr(self, self._down)
        if self._kind == "plain":
            up_weight = up_bias = None
            gate_weight, gate_bias = gate.weight, gate.bias
        elif self._kind == "fused":
            gate_weight, up_weight = gate.weight.chunk(2)
            gate_bias, up_bias = (None, None) if gate.bias is None else gate.bias.chunk(2)
        else:
            up = getattr(self, self._up)
            gate_weight, gate_bias, up_weight, up_bias = gate.weight, gate.bias, up.weight, up.bias
        return ops.gated_mlp(
            x,
            gate_weight,
            up_weight,
            down.weight,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down.bias,
            act=self._act,
        )

    def extra_repr(self) -> str:
        return f"kind={self._kind}, act={self._act}, intermediate_size={self.intermediate_size}"
