"""A model behind a cache of fixed length: with every shape known it can be compiled or captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import StaticCache

from prunekit.arch import cache_keyword
from prunekit.errors import InputError

_VERSIONS = 256  # of one function that may be compiled: a model, a test and a batch size each

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """How a model is run.

    Attributes:
        compile: through torch.compile.
        cuda_graph: what the GPU does is recorded once and played again, with no work for the host
            in between; together with compile, by torch.compile itself (reduce-overhead).
    """

    compile: bool = False
    cuda_graph: bool = False

    @property
    def fixed(self) -> bool:
        """Whether shapes have to be, so that the cache of keys and values is of fixed length."""
        return self.compile or self.cuda_graph

    def check(self) -> None:
        """Raise InputError where this machine cannot do it."""
        if self.cuda_graph and not torch.cuda.is_available():
            raise InputError("--cuda-graph: torch sees no NVIDIA GPU here; --compile alone works")

    def __str__(self) -> str:
        names = {"compiled": self.compile, "CUDA graph": self.cuda_graph}
        return ", ".join(["transformers", *(name for name, on in names.items() if on)])


EAGER = Way()


class FixedShapes:
    """A model that reads tokens, [B, S], behind what it read before, and predicts the next, [B, 1].

    Args:
        model: a transformers causal language model, in evaluation mode.
        length: the most tokens that it will ever be behind, the ones it reads included.
        way: what becomes of its forward; each number of tokens S is compiled or captured by itself,
            at its first call.

    Raises:
        InputError: its cache slides, which no recording can follow; or transformers is older than
            caches that count what they hold.

    Cost:
        Memory for the keys and values of ``length`` tokens.
    """

    def __init__(self, model: nn.Module, length: int, way: Way):
        self._model, self._name = model, cache_keyword(model)
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        if not all(hasattr(layer, "cumulative_length") for layer in self._cache.layers):
            raise InputError("--compile, --cuda-graph: need transformers 5.17 or newer")
        if way.cuda_graph and any(layer.is_sliding for layer in self._cache.layers):
            raise InputError("--cuda-graph: this model's attention slides; leave it out")
        self._way, self._steps = way, {}

    @torch.inference_mode()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """What a call gives, neither compiled nor captured: for a shape that comes once."""
        return self._forward(ids)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape not in self._steps:
            self._forward(ids)  # allocates the cache, which no recording should
            self.forget(ids.shape[1])
            self._steps[ids.shape] = self._prepared(ids)
        return self._steps[ids.shape](ids)

    def forget(self, tokens: int) -> None:
        """So many tokens were not read after all."""
        _shorten(self._cache, tokens)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        given = {self._name: self._cache, "use_cache": True, "logits_to_keep": 1}
        return self._model(input_ids=ids, **given).logits[:, -1:].argmax(-1)

    def _prepared(self, ids: torch.Tensor) -> Step:
        if self._way.compile:
            mode = "reduce-overhead" if self._way.cuda_graph else None
            step = torch.compile(self._forward, mode=mode, dynamic=False)
            # Else torch.compile gives up on a function that it compiled for others before.
            with torch._dynamo.config.patch(recompile_limit=_VERSIONS):
                step(ids)
            self.forget(ids.shape[1])
            # A result of reduce-overhead lies where the next call writes.
            return (lambda ids: step(ids).clone()) if mode else step
        return _captured(self._forward, self.forget, ids) if self._way.cuda_graph else self._forward


def _shorten(cache: StaticCache, tokens: int) -> None:
    """As ``cache.crop(-tokens)``, which transformers 5.17 lacks for layers of fixed length."""
    for layer in cache.layers:
        if hasattr(layer, "crop"):
            layer.crop(-tokens)
            continue
        layer.cumulative_length.sub_(tokens)
        if layer.is_sliding:
            layer.cumulative_length_int -= tokens


def _captured(step: Step, forget: Callable[[int], None], ids: torch.Tensor) -> Step:
    """Record what a step makes the GPU do, on ids of this shape."""
    given, side = ids.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first run does, compiling kernels, cannot be recorded
        for _ in range(3):
            step(given)
            forget(given.shape[1])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # nothing runs here, so there is nothing to forget
        out = step(given)

    def replay(ids: torch.Tensor) -> torch.Tensor:
        given.copy_(ids)
        graph.replay()
        return out.clone()

    return replay
