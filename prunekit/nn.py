"""`CompactMLP`: a drop-in MLP whose forward is one operation."""

from __future__ import annotations

import torch
from torch import nn

from prunekit import ops
from prunekit.arch import MLPView


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module does nothing but multiply by its weight and add its bias."""
    own = vars(module)
    return (
        type(module) is nn.Linear
        and not own["_forward_pre_hooks"]
        and not own["_forward_hooks"]
        and not own["_backward_pre_hooks"]
        and not own["_backward_hooks"]
        and "forward" not in own
    )


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
        self._kind = view.kind
        names = {id(child): name for name, child in view.module.named_children()}
        gate, down = names[id(view.slots["gate"].owner)], names[id(view.slots["down"].owner)]
        up = names[id(view.slots["up"].owner)] if view.kind == "gated" else None
        self._layout = gate, up, down, view.act  # the projections' names, the activation's
        self.register_buffer("kept", None, persistent=False)

    @property
    def intermediate_size(self) -> int:
        """F', the number of neurons."""
        return getattr(self, self._layout[2]).in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the MLP: [..., D] -> [..., D]."""
        # Read at every token, when weights have driven all else out of the caches: dictionaries
        # are asked, for a module's attributes take several times as long.
        own = vars(self)
        modules = own["_modules"]
        gate_name, up_name, down_name, act = own["_layout"]
        gate, down = modules[gate_name], modules[down_name]
        up = modules[up_name] if up_name else None
        if not (is_bare(gate) and is_bare(down) and (up is None or is_bare(up))):
            return self._call_projections(x)
        of_gate, of_down = vars(gate)["_parameters"], vars(down)["_parameters"]
        gate_weight, gate_bias = of_gate["weight"], of_gate["bias"]
        up_weight = up_bias = None
        if up is not None:
            of_up = vars(up)["_parameters"]
            up_weight, up_bias = of_up["weight"], of_up["bias"]
        elif self._kind == "fused":
            gate_weight, up_weight = gate_weight.chunk(2)
            gate_bias, up_bias = (None, None) if gate_bias is None else gate_bias.chunk(2)
        weights = gate_weight, up_weight, of_down["weight"]
        biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": of_down["bias"]}
        kept = own["_buffers"]["kept"]
        if kept is not None:
            return ops.gated_mlp_indexed(x, *weights, kept, **biases, act=act)
        return ops.gated_mlp(x, *weights, **biases, act=act)

    def _call_projections(self, x: torch.Tensor) -> torch.Tensor:
        gate_name, up_name, down_name, act = self._layout
        gate, up = getattr(self, gate_name)(x), None
        if self._kind == "fused":
            gate, up = gate.chunk(2, dim=-1)
        elif up_name is not None:
            up = getattr(self, up_name)(x)
        h = ops.ACTIVATIONS[act](gate)
        h = h if up is None else h * up
        if self.kept is not None:
            h = torch.zeros_like(h).index_copy(-1, self.kept.long(), h[..., self.kept])
        return getattr(self, down_name)(h)

    def extra_repr(self) -> str:
        act = self._layout[3]
        return f"kind={self._kind}, act={act}, intermediate_size={self.intermediate_size}"
