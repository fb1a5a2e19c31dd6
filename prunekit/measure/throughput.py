"""One prefill and one decode, as functions to be timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from prunekit.arch import cache_keyword, find_mlps, holds_attention
from prunekit.integrations.fixed_shapes import EAGER, FixedShapes, Way


def _synchronise(model: nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _tokens(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return ids.to(model.device)


def prefill_case(model: nn.Module, batch: int, prompt: int, way: Way = EAGER) -> Callable[[], None]:
    """A function that reads ``batch`` prompts of ``prompt`` tokens and predicts one token each."""
    ids = _tokens(model, batch, prompt)
    if way.fixed:
        step = FixedShapes(model, prompt, way)

        def run_fixed() -> None:
            step(ids)
            _synchronise(model)
            step.forget(prompt)

        return run_fixed

    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        _synchronise(model)

    return run


def decode_case(
    model: nn.Module, batch: int, prompt: int, generate: int, way: Way = EAGER
) -> Callable[[], None]:
    """A function that decodes ``generate`` tokens greedily after a prompt that is already read.

    No token ends it early, so every run does the same work.
    """
    if way.fixed:
        step = FixedShapes(model, prompt + generate, way)
        first = step.read(_tokens(model, batch, prompt))

        def run_fixed() -> None:
            token = first
            for _ in range(generate):
                token = step(token)
            _synchronise(model)
            step.forget(generate)

        return run_fixed
    with torch.inference_mode():
        out = model(input_ids=_tokens(model, batch, prompt), use_cache=True, logits_to_keep=1)
    name = cache_keyword(model)
    cache = out[name]
    first = out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def run() -> None:
        token = first
        for _ in range(generate):
            step = model(input_ids=token, use_cache=True, **{name: cache})
            token = step.logits[:, -1:].argmax(-1)
        _synchronise(model)
        cache.crop(-generate)  # negative: so many tokens fewer

    return run


def mlps_case(model: nn.Module, batch: int, tokens: int, times: int) -> Callable[[], None] | None:
    """A function that runs every MLP on [batch, tokens, D] so many times; None where none is alone.

    Experts wait for a router, and MLPs that share a module with attention cannot be called.
    """
    views = find_mlps(model, verify=False)
    modules = [v.module for v in views if v.kind != "experts" and not holds_attention(v.module)]
    if not modules:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, views[0].down.shape[0], generator=generator)
    x = x.to(model.device, views[0].down.dtype)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(times):
            for module in modules:
                module(x)
        _synchronise(model)

    return run
