"""One backward pass over the target: what the loss says of every neuron, and of each MLP's output.

Only the MLPs' matrices require a gradient. Each is reduced to a number a neuron the moment it
exists, and freed, so no more than one matrix's gradient is held whatever the model's size; each
decoder layer computes its activations again on the way back instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunekit import ops
from prunekit.arch import MLPView, Slot, decoder_layers
from prunekit.batching import Tokens
from prunekit.errors import InputError
from prunekit.progress import progress_bar
from prunekit.stats import NeuronSums

# Lengths are rounded up to a multiple of this by padding on the right, which no token sees: the
# CPU's library compiles and keeps each product of a new shape, a gigabyte for 200 lengths.
_ROUND = 32


def add_gradients(
    model: nn.Module,
    views: list[MLPView],
    prompts: Sequence[Tokens],
    sums: list[NeuronSums],
    *,
    quiet: bool = False,
) -> None:
    """Fill `taylor` and `gradient_gram` of every MLP's sums from the next-token loss.

    The loss is summed over a prompt's tokens. Prompts go one by one, since the absolute value in
    `taylor` is taken of a prompt's gradient: the result depends on no batch size.

    Args:
        model: a transformers causal language model, in evaluation mode.
        views: its MLPs.
        prompts: encoded; one of a single token has no next token, and adds nothing.
        sums: one an MLP, changed in place; `gradient_gram` holds its upper triangle until `finish`.
        quiet: no progress bar.

    Raises:
        InputError: weights are offloaded or quantised, or a gradient is not finite.

    Cost:
        Two forwards and a backward; 6·T·D·F FLOP more an MLP for the gradients of its matrices and
        T·D² for the Gram matrix. 4·D² bytes an MLP (an expert), the gradient of one parameter,
        and 8·T·V bytes of logits for a prompt of T tokens.
    """
    for view, mine in zip(views, sums, strict=True):
        if not view.readable:
            raise InputError(
                f"{view.name}: its weights are offloaded or quantised ({view.gate.dtype}); "
                "gradients need them as numbers in memory: use a smaller model, or bf16"
            )
        device = view.gate.device
        mine.taylor = torch.zeros(view.width, dtype=torch.float64, device=device)
        mine.gradient_gram = torch.zeros(2 * view.down.shape[:1], device=device)
    total = sum(len(p.ids) for p in prompts)
    with ExitStack() as stack:
        stack.enter_context(_weights_reduced(model, views, sums))
        stack.enter_context(_outputs_watched(views, sums))
        stack.enter_context(checkpointed(decoder_layers(model, views)))
        bar = stack.enter_context(progress_bar(total, "gradients", "tok", quiet=quiet))
        # Longest first: what later prompts need fits where earlier ones were, where any other order
        # left the allocator with five times the memory in pieces.
        for prompt in sorted(prompts, key=lambda p: -len(p.ids)):
            _backward(model, prompt)
            bar.update(len(prompt.ids))
    for view, mine in zip(views, sums, strict=True):
        if not torch.isfinite(mine.taylor).all():
            raise InputError(f"{view.name}: its gradients hold NaN or Inf; use bf16 or fp32")


@torch.enable_grad()
def _backward(model: nn.Module, prompt: Tokens) -> None:
    if len(prompt.ids) < 2:
        return
    tokens = len(prompt.ids)
    ids = torch.zeros(1, -(-tokens // _ROUND) * _ROUND, dtype=torch.int64)
    ids[0, :tokens] = torch.tensor(prompt.ids)
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, : tokens - 1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    wanted = ids[0, 1:tokens].to(logits.device)
    F.cross_entropy(logits.to(wide), wanted, reduction="sum").backward()


def _neurons(slot: Slot, tensor: torch.Tensor, width: int) -> torch.Tensor:
    """A slot's run of a tensor that has its parameter's shape."""
    matrix = tensor if slot.expert is None else tensor[slot.expert]
    return matrix.narrow(slot.axis, slot.start, width)


@contextmanager
def _weights_reduced(
    model: nn.Module, views: list[MLPView], sums: list[NeuronSums]
) -> Iterator[None]:
    """Inside, a backward adds each MLP matrix's abs(w·grad) to `taylor` and drops the gradient."""
    slots: dict[int, list[tuple[int, Slot]]] = {}  # a fused matrix or one of experts has several
    for index, view in enumerate(views):
        for role in {"gate", "up", "down"} & view.slots.keys():
            slot = view.slots[role]
            slots.setdefault(id(slot.parameter), []).append((index, slot))

    def reduce(parameter: nn.Parameter) -> None:
        for index, slot in slots[id(parameter)]:
            width = views[index].width
            weight = _neurons(slot, parameter.detach(), width)
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            change = wide * _neurons(slot, parameter.grad, width)
            sums[index].taylor += torch.linalg.vector_norm(
                change, ord=1, dim=1 - slot.axis, dtype=torch.float64
            )
        parameter.grad = None

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    hooks = []
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in slots)
            if id(parameter) in slots:
                hooks.append(parameter.register_post_accumulate_grad_hook(reduce))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def _outputs_watched(views: list[MLPView], sums: list[NeuronSums]) -> Iterator[None]:
    """Inside, a backward adds Σ g gᵀ of each MLP's output gradients to `gradient_gram`."""
    owners: dict[nn.Module, list[int]] = {}
    for index, view in enumerate(views):
        owners.setdefault(view.down_owner, []).append(index)
    hooks = [
        owner.register_forward_hook(
            _experts_hook(views, indices, sums)
            if views[indices[0]].kind == "experts"
            else _output_hook(sums[indices[0]])
        )
        for owner, indices in owners.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _output_hook(sums: NeuronSums) -> Callable:
    def gather(gradient: torch.Tensor) -> None:
        ops.gram_update(sums.gradient_gram, gradient.reshape(-1, gradient.shape[-1]))

    def watch(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(gather)

    return watch


def _experts_hook(views: list[MLPView], indices: list[int], sums: list[NeuronSums]) -> Callable:
    """An expert's output enters the sum by its router's weight, and so does its gradient."""

    def watch(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        _, chosen, weights = arguments
        if output.requires_grad:
            output.register_hook(lambda gradient: gather(gradient, chosen, weights.detach()))

    def gather(gradient: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1])
        for index in indices:
            rows, choice = torch.where(chosen == views[index].expert)
            own = gradient[rows].float() * weights[rows, choice, None].float()
            ops.gram_update(sums[index].gradient_gram, own)

    return watch


@contextmanager
def checkpointed(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, the layers keep their inputs alone, and run again when the backward needs more."""

    def again(forward: Callable) -> Callable:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return lambda *values, **named: checkpoint(forward, *values, **named, **options)

    before = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for layer, _ in before:
            layer.forward = again(layer.forward)
        yield
    finally:
        for layer, forward in before:
            if forward is not None:
                layer.forward = forward
            else:
                vars(layer).pop("forward", None)
