"""Runs a model with every MLP's activation handed to a function of ours, which returns h.

The model computes what it always computes; only the step from the gate and up products to h goes
through the tap, so statistics cost no second product, no copy and no extra pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from prunekit.arch import MLPView, blocks
from prunekit.nn import is_bare
from prunekit.ops.linear import linear

# tap(view index, gate [T, F], up [T, F] or None, rows [T] or None) -> h [T, F]
# rows: which token of the batch each row is, ascending; None where row t is token t.
Tap = Callable[[int, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"], torch.Tensor]
# mlp_tap(view index, x [T, D]) -> y [T, D]: a whole MLP, for those that are bare products
MLPTap = Callable[[int, torch.Tensor], torch.Tensor]


def _flat(tap: Tap, index: int, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """Call the tap on [T, F], whatever leading axes the model keeps."""
    width = gate.shape[-1]
    rows_up = None if up is None else up.reshape(-1, width)
    return tap(index, gate.reshape(-1, width), rows_up, None).view(gate.shape)


def _gated_forward(view: MLPView, index: int, tap: Tap):
    mlp = view.module

    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(_flat(tap, index, mlp.gate_proj(x), mlp.up_proj(x)))

    return forward


def _fused_forward(view: MLPView, index: int, tap: Tap):
    mlp = view.module

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate_up = mlp.gate_up_proj(x)
        gate_up = gate_up.view(-1, gate_up.shape[-1])
        gate, up = gate_up.chunk(2, dim=-1)
        return mlp.down_proj(tap(index, gate, up, None)).view(*x.shape[:-1], -1)

    return forward


def _whole_forward(index: int, mlp_tap: MLPTap):
    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp_tap(index, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    return forward


def _experts_forward(views: list[MLPView], indices: list[int], tap: Tap):
    experts = views[indices[0]].module

    def forward(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for index in indices:
            e = views[index].expert
            rows, choice = torch.where(chosen == e)
            gate, up = linear(x[rows], experts.gate_up_proj[e]).chunk(2, dim=-1)
            h = tap(index, gate, up, rows)
            part = linear(h, experts.down_proj[e]) * weights[rows, choice, None]
            y.index_add_(0, rows, part.to(y.dtype))
        return y

    return forward


class _ActivationTap(nn.Module):
    def __init__(self, index: int, tap: Tap):
        super().__init__()
        self.index, self.tap = index, tap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _flat(self.tap, self.index, x, None)


@contextmanager
def _replaced(owner: nn.Module, name: str, value) -> Iterator[None]:
    own = name in owner.__dict__ or name in owner._modules
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def observed(views: list[MLPView], tap: Tap, mlp_tap: MLPTap | None = None) -> Iterator[None]:
    """Inside the block, every MLP of these views obtains its h from ``tap``.

    With ``mlp_tap``, an MLP that is a module of its own over bare Linears goes to it as a whole.
    """
    with ExitStack() as stack:
        for indices in blocks(views):
            view, index = views[indices[0]], indices[0]
            bare = all(is_bare(slot.owner) for slot in view.slots.values())
            if mlp_tap is not None and bare and view.kind in ("gated", "fused"):
                forward = _whole_forward(index, mlp_tap)
            elif view.kind == "gated":
                forward = _gated_forward(view, index, tap)
            elif view.kind == "fused":
                forward = _fused_forward(view, index, tap)
            elif view.kind == "experts":
                forward = _experts_forward(views, indices, tap)
            else:
                wrapped = _ActivationTap(index, tap)
                stack.enter_context(_replaced(view.module, view.act_name, wrapped))
                continue
            stack.enter_context(_replaced(view.module, "forward", forward))
        yield
