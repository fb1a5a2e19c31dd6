"""The loss of prompts run backwards, within bounds of memory: what all gradients here come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunekit.arch import MLPView, decoder_layers, decoder_of
from prunekit.batching import Batch

# Lengths are rounded up to a multiple of this by padding on the right, which no token sees: the
# CPU's library compiles and keeps each product of a new shape, a gigabyte for 200 lengths.
ROUND = 32
HEAD_BYTES = 12 << 20  # of fp32 logits at a time
IGNORED = -100  # cross_entropy's label for what is not to be scored
KEPT_BYTES = 1 << 30  # of activations that a backward may keep instead of computing them again


def padded(batch: Batch) -> torch.Tensor:
    """A batch's ids, [B, S], S a multiple of 32."""
    return F.pad(batch.ids, (0, -batch.ids.shape[1] % ROUND))


@contextmanager
def training_only(model: nn.Module, weights: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Inside, these parameters and no others require gradients, and none has one yet."""
    chosen = {id(weight) for weight in weights}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def calling_instead(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, the module's forward is another."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def hand_on(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """The forward of a decoder layer that is idle."""
    return hidden_states


@contextmanager
def idle(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, decoder layers hand on what they get."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(calling_instead(layer, hand_on))
        yield


@contextmanager
def loss_backward(
    model: nn.Module, views: Sequence[MLPView], groups: Sequence[Batch]
) -> Iterator[Callable[[Batch], None]]:
    """Inside, a function that runs a batch forwards and its next-token loss backwards.

    The loss is summed over the tokens of the completions (`Tokens.scored`), which are what the
    pruned model will be asked for; of plain text over all. Where the model's logits are what its
    head gives for the decoder's output, loss and gradient are computed some tokens at a time and
    never lie in memory as a whole; where they are more (capped, scaled), they do.

    Args:
        model: a transformers causal language model, in evaluation mode.
        views: its MLPs.
        groups: the batches to come. Where the layers' activations of the largest do not fit in
            1 GB, each layer keeps its inputs alone, and runs again when the backward needs more.

    Cost:
        A forward and a backward (with weights frozen 4 FLOP a parameter and token), and another
        forward where activations do not fit.
    """
    layers = decoder_layers(model, list(views))
    largest = max(padded(batch).numel() for batch in groups)
    head = _bare_head(model, groups[0])
    with ExitStack() as stack:
        if largest * kept_bytes(views) > KEPT_BYTES:
            stack.enter_context(_checkpointed(layers))
        embeddings = model.get_input_embeddings()
        stack.callback(embeddings.register_forward_hook(_require_gradient).remove)

        @torch.enable_grad()
        def run(batch: Batch) -> None:
            ids = padded(batch).to(embeddings.weight.device)
            labels = next_tokens(batch, ids)
            if head is None:
                logits = model(input_ids=ids, use_cache=False).logits
                known = labels != IGNORED
                _summed(logits[known], labels[known]).backward()
                return
            hidden = decoder_of(model)(input_ids=ids, use_cache=False)[0]
            hidden.backward(_through_head(head, hidden.detach(), labels))

        yield run


def kept_bytes(views: Sequence[MLPView]) -> int:
    """What a token leaves behind in all layers: four of width F, and about 16 of D."""
    layers = {view.layer: view.down.shape[0] for view in views}
    size = views[0].gate.element_size()
    return size * (4 * sum(view.width for view in views) + 16 * sum(layers.values()))


def next_tokens(batch: Batch, ids: torch.Tensor) -> torch.Tensor:
    """The token that each position is to predict: [B, S]; IGNORED where there is none to score.

    Args:
        batch: whose `scored` and `lengths` say which tokens count.
        ids: [B, S], its token ids, padded to any length.
    """
    following = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    first, end = (
        torch.tensor(t, device=ids.device)[:, None] for t in (batch.scored, batch.lengths)
    )
    known = (following >= first) & (following < end)
    return ids.roll(-1, dims=1).masked_fill(~known, IGNORED)


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels.to(logits.device), reduction="sum")


def _logits_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradient of `_summed`, [T, V] in the logits' dtype: softmax less 1 at the label.

    Autograd keeps four times as much in fp32 for it.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    wide.sub_(wide.amax(-1, keepdim=True)).exp_()
    wide.div_(wide.sum(-1, keepdim=True))
    wide[torch.arange(len(labels), device=wide.device), labels.to(wide.device)] -= 1
    return wide.to(logits.dtype)


def _through_head(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss's gradient with respect to the decoder's output: [B, S, D]."""
    gradient = torch.zeros_like(hidden)
    labels = labels.to(hidden.device)
    rows = max(HEAD_BYTES // (4 * head.weight.shape[0]), 1)
    for chosen in (labels != IGNORED).flatten().nonzero().flatten().split(rows):
        wide = F.pad(chosen, (0, -len(chosen) % ROUND))  # by the first token, for the shape alone
        part = hidden.flatten(0, 1)[wide].requires_grad_()
        logits = head(part)
        logits.backward(_logits_gradient(logits.detach(), labels.flatten()[wide].clamp(min=0)))
        gradient.flatten(0, 1)[chosen] = part.grad[: len(chosen)]
    return gradient


@torch.no_grad()
def _bare_head(model: nn.Module, batch: Batch) -> nn.Module | None:
    """The model's head if its logits are what the head gives for the decoder's output."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    ids = batch.ids[:1, :8].to(model.get_input_embeddings().weight.device)
    want = model(input_ids=ids, use_cache=False).logits
    got = head(decoder_of(model)(input_ids=ids, use_cache=False)[0])
    return head if torch.equal(got.to(want), want) else None


def _require_gradient(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


@contextmanager
def _checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the layers keep their inputs alone, and run again when the backward needs more."""

    def again(forward: Callable) -> Callable:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return lambda *values, **named: checkpoint(forward, *values, **named, **options)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(calling_instead(layer, again(layer.forward)))
        yield
