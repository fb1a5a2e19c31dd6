"""A model whose decoder layers stay on disk: each is in memory only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from prunekit.arch import decoder_layers, decoder_of, members
from prunekit.backward import calling_instead, idle
from prunekit.batching import Batch
from prunekit.checkpoint.stream import Checkpoint

# A layer alone: a batch and what enters the layer, [B, S, D], give what leaves it, [B, S, D].
Alone = Callable[[Batch, torch.Tensor], torch.Tensor]


class Offloaded:
    """A model of which embeddings, norms and head are in memory, and a layer where it is asked for.

    What the decoder calls its layers with, beside their hidden states, must not depend on these.

    Args:
        checkpoint: whose ``shape`` has its buffers (`integrations.loading.load_shape`); it is
            filled in.
        device: where all of it runs.

    Attributes:
        model: the shape.
        views: its MLPs; their weights are there while their layer is `resident`.
        inside: for each layer the positions of its MLPs among them.

    Raises:
        InputError: the checkpoint lacks a tensor, or has it in another shape.

    Cost:
        The bytes of what is in no layer.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.model, self.views = checkpoint.shape, checkpoint.views
        self.layers = decoder_layers(self.model, self.views)
        self.inside = [members(layer, self.views) for layer in self.layers]
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._tuples = False  # whether layers return their hidden states in a tuple
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    entry = checkpoint.find(self._name(module, name))
                    module._buffers[name] = (entry.read() if entry else buffer).to(self.device)
        in_layers = {id(part) for layer in self.layers for part in layer.modules()}
        self._fill(part for part in self.model.modules() if id(part) not in in_layers)
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:  # a layer's: to be there when its turn comes
                checkpoint.fitting(name, parameter)

    def _name(self, module: nn.Module, attribute: str) -> str:
        return f"{self._names[id(module)]}.{attribute}"

    def _fill(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Read the parameters that are on disk; returns what was in their places."""
        before = []
        for module in modules:
            for attribute, parameter in module._parameters.items():
                name = self._name(module, attribute)
                if parameter is None or self.checkpoint.find(name) is None:
                    continue
                entry = self.checkpoint.fitting(name, parameter)
                value = entry.read().to(self.device, parameter.dtype)
                before.append((module, attribute, parameter))
                module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        return before

    @contextmanager
    def resident(self, number: int) -> Iterator[None]:
        """Inside, a layer's weights are in memory."""
        before = self._fill(self.layers[number].modules())
        try:
            yield
        finally:
            for module, attribute, parameter in before:
                module._parameters[attribute] = parameter

    def layer_bytes(self) -> int:
        """What the largest layer takes in memory."""
        return max(sum(p.nbytes for p in layer.parameters()) for layer in self.layers)

    def other_bytes(self) -> int:
        """What is always in memory."""
        total = sum(p.nbytes for p in self.model.parameters())
        return total - sum(p.nbytes for layer in self.layers for p in layer.parameters())

    def _run(self, batch: Batch) -> None:
        decoder_of(self.model)(input_ids=batch.ids.to(self.device), use_cache=False)

    def embed(self, batch: Batch) -> torch.Tensor:
        """What enters the first layer: [B, S, D]."""
        seen: list[torch.Tensor] = []

        def keep(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            seen.append(hidden_states)
            return hidden_states

        with idle(self.layers), calling_instead(self.layers[0], keep):
            self._run(batch)
        return seen[0]

    @contextmanager
    def alone(self, number: int) -> Iterator[Alone]:
        """Inside, a function that runs one layer, which must be resident, as the decoder does."""
        layer, place = self.layers[number], {}
        forward = layer.forward

        def here(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            out = forward(place["in"], *arguments, **named)
            self._tuples = isinstance(out, tuple)
            place["out"] = out[0] if self._tuples else out
            return out

        def run(batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
            place["in"] = hidden
            self._run(batch)
            return place.pop("out")

        with idle(self.layers), calling_instead(layer, here):
            yield run

    def ending(self, hidden: torch.Tensor) -> AbstractContextManager[None]:
        """Inside, the last layer returns this; the layers ran `alone` before."""
        given = (hidden,) if self._tuples else hidden
        return calling_instead(self.layers[-1], lambda *_, **__: given)
