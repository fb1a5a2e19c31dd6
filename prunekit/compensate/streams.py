"""Runs a decoder layer by layer over hidden states that are kept: what layer-wise repair needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunekit.arch import MLPView, Slot, decoder_of
from prunekit.backward import calling_instead, idle
from prunekit.batching import Batch
from prunekit.nn import is_bare
from prunekit.ops.gram import bf16_products


@dataclass
class Calls:
    """How the model calls its layers on one batch.

    Attributes:
        hidden: [B, S, D], fp32: what enters the first layer.
        rest: for each layer the other positional and named arguments.
        counted: [B·S], bool: which rows are tokens of a prompt and not padding.
    """

    hidden: torch.Tensor
    counted: torch.Tensor
    rest: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's hidden states for other inputs than the model's own."""
        arguments, named = self.rest[index]
        out = layer(hidden, *arguments, **named)
        return out[0] if isinstance(out, tuple) else out


class _Wide:
    """Widens to fp32 what layers are called with; what many share (masks, rotations) only once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if id(value) not in self._known:
                self._known[id(value)] = value, value.float()  # holding it keeps its id its own
            return self._known[id(value)][1]
        if isinstance(value, tuple):
            return tuple(map(self, value))
        return value


@torch.no_grad()
def record_calls(
    model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch]
) -> list[Calls]:
    """Run the dense decoder over each batch and keep how it calls its layers.

    What a layer is called with beside its hidden states seldom depends on them. Whether it does
    here, the first batch tells; if not, layers hand on what they get, and cost nothing.
    """
    calls = [_record(model, layers, batches[0], handing_on=False)]
    same = _equal(calls[0].rest, _record(model, layers, batches[0], handing_on=True).rest)
    return calls + [_record(model, layers, batch, handing_on=same) for batch in batches[1:]]


def _record(
    model: nn.Module, layers: Sequence[nn.Module], batch: Batch, *, handing_on: bool
) -> Calls:
    device = next(model.parameters()).device
    calls = Calls(torch.empty(0), batch.counted().to(device))
    wide = _Wide()

    def keep(layer: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        named = dict(named)
        hidden = arguments[0] if arguments else named.pop("hidden_states")
        if not calls.rest:
            calls.hidden = hidden.float()
        named = {name: wide(value) for name, value in named.items()}
        calls.rest.append((tuple(map(wide, arguments[1:])), named))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        if handing_on:
            stack.enter_context(idle(layers))
        decoder_of(model)(input_ids=batch.ids.to(device), use_cache=False)
    return calls


@torch.no_grad()
def logits_after(
    model: nn.Module, layers: Sequence[nn.Module], batch: Batch, hidden: torch.Tensor
) -> torch.Tensor:
    """The model's logits, [B, S, V], from what its last layer gives for a batch: [B, S, D]."""
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    with idle(layers[:-1]), calling_instead(layers[-1], lambda *_, **__: hidden.to(dtype)):
        return model(input_ids=batch.ids.to(device), use_cache=False).logits


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or one == other


@contextmanager
def in_fp32(module: nn.Module) -> Iterator[None]:
    """Inside, a module's weights are fp32: its results are, so small differences survive.

    bf16 weights still multiply as bf16 on the CPU, with fp32 sums. Weights that nobody changed come
    back bit for bit.
    """
    before = {parameter: parameter.dtype for parameter in module.parameters()}
    buffers = dict(module.named_buffers())
    with ExitStack() as stack:
        if torch.bfloat16 in before.values():
            stack.enter_context(bf16_products())
        module.float()
        try:
            yield
        finally:
            for parameter, dtype in before.items():
                parameter.data = parameter.data.to(dtype)
            for name, buffer in buffers.items():
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._buffers[leaf] = buffer


@contextmanager
def watched(down: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, the last input h and output y of a down projection, as rows: [T, F] and [T, D]."""
    seen: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        seen["h"] = arguments[0].reshape(-1, arguments[0].shape[-1])
        seen["y"] = output.reshape(-1, output.shape[-1])

    handle = down.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


class Narrowed:
    """Inside, the gate and up projections compute the neurons that stay, and no others.

    Where they are more than bare Linears, which may know their width otherwise, they stay whole.

    Args:
        view: of an MLP whose weights stay as they are while this is used.
        kept: [F'], int64, its neurons.
    """

    def __init__(self, view: MLPView, kept: torch.Tensor):
        shared: dict[int, list[Slot]] = {}  # a fused matrix holds both
        for role, slot in view.slots.items():
            if role.startswith(("gate", "up")):
                shared.setdefault(id(slot.parameter), []).append(slot)
        self._narrow: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._whole: list[torch.Tensor] = []
        for slots in shared.values():
            parameter = slots[0].parameter
            bare = all(is_bare(slot.owner) and slot.axis == 0 for slot in slots)
            if not bare or len(slots) * view.width != parameter.shape[0]:
                self._narrow.clear()
                return
            rows = torch.cat([slot.start + kept for slot in sorted(slots, key=lambda s: s.start)])
            self._narrow.append((parameter, parameter.detach()[rows.to(parameter.device)]))

    def __enter__(self) -> None:
        self._whole = [parameter.data for parameter, _ in self._narrow]
        for parameter, narrow in self._narrow:
            parameter.data = narrow

    def __exit__(self, *_: object) -> None:
        for (parameter, _), whole in zip(self._narrow, self._whole, strict=True):
            parameter.data = whole
