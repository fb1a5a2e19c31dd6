"""A model whose weights stay on disk: each layer, and the ends, are in memory while they run."""

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
from prunekit.heap import trim

# A layer alone: a batch and what enters the layer, [B, S, D], give what leaves it, [B, S, D].
Alone = Callable[[Batch, torch.Tensor], torch.Tensor]

_Place = tuple[nn.Module, str, nn.Parameter]  # a module's attribute, and what was there


def _put_back(places: list[_Place]) -> None:
    """Undo `Offloaded._fill`, and let the memory go."""
    for module, attribute, parameter in places:
        module._parameters[attribute] = parameter
    trim()


class Offloaded:
    """A model of which norms and the like are in memory, and the rest where it is asked for.

    What the decoder calls its layers with, beside their hidden states, must depend neither on these
    nor on the tokens.

    Args:
        checkpoint: whose ``shape`` has its buffers (`integrations.loading.load_shape`); it is
            filled in.
        device: where all of it runs.

    Attributes:
        model: the shape.
        views: its MLPs; their weights are there while their layer is `resident`.
        ends: the embedding of tokens, and the head where there is one; they are there inside
            `with_ends`.
        inside: for each layer the positions of its MLPs among them.

    Raises:
        InputError: the checkpoint lacks a tensor, or has it in another shape.

    Cost:
        The bytes of what is neither in a layer nor an end.
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
        ends = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.ends = [end for end in ends if end is not None]
        later = {id(part) for whole in (*self.layers, *self.ends) for part in whole.modules()}
        self._fill(part for part in self.model.modules() if id(part) not in later)
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:  # to be there when its turn comes
                checkpoint.fitting(name, parameter)

    def _name(self, module: nn.Module, attribute: str) -> str:
        return f"{self._names[id(module)]}.{attribute}"

    def _fill(self, modules: Iterable[nn.Module]) -> list[_Place]:
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
            _put_back(before)

    @contextmanager
    def with_ends(self) -> Iterator[None]:
        """Inside, the embeddings and the head are in memory."""
        first, none = self.ends[0], self.ends[0].weight
        tied = [end for end in self.ends[1:] if end.weight is none]
        before = self._fill(part for end in self.ends if end not in tied for part in end.modules())
        try:
            for end in tied:
                end.weight = first.weight
            yield
        finally:
            for end in tied:
                end.weight = none
            _put_back(before)

    def layer_bytes(self) -> int:
        """What the largest layer takes in memory."""
        return max(sum(p.nbytes for p in layer.parameters()) for layer in self.layers)

    def ends_bytes(self) -> int:
        """What the ends take in memory, a matrix that both share once."""
        return sum({id(p): p.nbytes for end in self.ends for p in end.parameters()}.values())

    def embed(self, batch: Batch) -> torch.Tensor:
        """What enters the first layer, [B, S, D]; called inside `with_ends`."""
        seen: list[torch.Tensor] = []

        def keep(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            seen.append(hidden_states)
            return hidden_states

        with idle(self.layers), calling_instead(self.layers[0], keep):
            decoder_of(self.model)(input_ids=batch.ids.to(self.device), use_cache=False)
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
            # In the embeddings' place, which are not there: what they give goes nowhere.
            nothing = torch.zeros((), dtype=hidden.dtype, device=self.device)
            nothing = nothing.expand(*batch.ids.shape, self.ends[0].weight.shape[1])
            decoder_of(self.model)(inputs_embeds=nothing, use_cache=False)
            return place.pop("out")

        with idle(self.layers), calling_instead(layer, here):
            yield run

    def ending(self, hidden: torch.Tensor) -> AbstractContextManager[None]:
        """Inside, the last layer returns this; the layers ran `alone` before."""
        given = (hidden,) if self._tuples else hidden
        return calling_instead(self.layers[-1], lambda *_, **__: given)
