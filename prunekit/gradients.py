"""One backward pass over the target: what the loss says of every MLP's output, and of every neuron.

Where a criterion asks for it the MLPs' matrices require a gradient too. Each is reduced to a number
a neuron the moment it exists, and freed, so no more than one matrix's gradient is held whatever the
model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from prunekit import ops, ranks
from prunekit.arch import MLPView, Slot
from prunekit.backward import ROUND, loss_backward, training_only
from prunekit.batching import Batch, Tokens, batches
from prunekit.course import Course
from prunekit.errors import InputError
from prunekit.progress import progress_bar
from prunekit.stats import NeuronSums

BATCH_TOKENS = 1024  # of a batch that runs backwards, padding included


def add_gradients(
    model: nn.Module,
    views: list[MLPView],
    prompts: Sequence[Tokens],
    sums: list[NeuronSums],
    *,
    taylor: bool = False,
    begin: Callable[[Batch], None] | None = None,
    course: Course | None = None,
    squares: list[torch.Tensor | None] | None = None,
    label: str = "gradients",
    quiet: bool = False,
) -> list[torch.Tensor | None]:
    """Fill `gradient_gram` of every MLP's sums from the next-token loss, and `taylor` if asked to.

    The loss is summed over the tokens of a prompt's completion, of plain text over all; over all,
    too, where no prompt's completion has a token (they were cut). For `taylor` prompts go one by
    one, since the absolute value is taken of a prompt's gradient: the result depends on no batch
    size.

    Args:
        model: a transformers causal language model, in evaluation mode.
        views: its MLPs.
        prompts: encoded; one without a token to score adds nothing.
        sums: one an MLP, changed in place; `gradient_gram` holds its upper triangle until `finish`.
            What is there already is added to.
        taylor: also gather the weights' gradients.
        begin: told of each batch, as it is padded, before it runs.
        course: says which batches are left, and may stop between two.
        squares: what is returned, from `output_squares`, where whoever stops this must have it.
        label: of the progress bar.
        quiet: no progress bar.

    Returns:
        For each MLP ‖g‖² of every token, g the gradient at its output: [T] in fp32 on the CPU, in
        the order of the prompts; None for an expert.

    Raises:
        InputError: weights are offloaded or quantised. Whether what came out is finite,
            `check_gradients` says.

    Cost:
        `loss_backward` and T·D² FLOP an MLP (an expert) for the Gram matrix; 4·D² bytes an MLP.
        With taylor 6·T·D·F FLOP an MLP more, and the gradient of one parameter.
    """
    for view, mine in zip(views, sums, strict=True):
        if not view.readable:
            raise InputError(
                f"{view.name}: its weights are offloaded or quantised ({view.gate.dtype}); "
                "gradients need them as numbers in memory: use a smaller model, or bf16"
            )
        device = view.gate.device
        if mine.gradient_gram is None:
            mine.gradient_gram = torch.zeros(2 * view.down.shape[:1], device=device)
        if taylor and mine.taylor is None:
            mine.taylor = torch.zeros(view.width, dtype=torch.float64, device=device)
    squares = output_squares(views, prompts) if squares is None else squares
    _run(model, views, prompts, sums, squares, taylor, begin, course or Course(), label, quiet)
    return squares


def output_squares(views: list[MLPView], prompts: Sequence[Tokens]) -> list[torch.Tensor | None]:
    """Room for ‖g‖² of every token of the prompts: zeros, [T] an MLP, None for an expert."""
    total = sum(len(p.ids) for p in prompts)
    return [None if v.kind == "experts" else torch.zeros(total) for v in views]


def output_gradients(
    model: nn.Module, views: list[MLPView], prompts: Sequence[Tokens], *, quiet: bool = False
) -> list[torch.Tensor | None]:
    """What `add_gradients` returns, where nothing else is wanted of it."""
    squares = output_squares(views, prompts)
    _run(model, views, prompts, None, squares, False, None, Course(), "gradients", quiet)
    return squares


def _run(
    model, views, prompts, sums, squares, taylor: bool, begin, course: Course, label, quiet
) -> None:
    groups = ranks.share(gradient_batches(prompts, taylor=taylor))
    outputs = Outputs(views, sums, prompts, squares)
    if groups:
        _run_groups(model, views, groups, sums, outputs, taylor, begin, course, label, quiet)
    ranks.add_up_(squares)


def gradient_batches(prompts: Sequence[Tokens], *, taylor: bool) -> list[Batch]:
    """The batches that run backwards, padded; what is scored of them is as for `add_gradients`."""
    if not any(max(p.scored, 1) < len(p.ids) for p in prompts):
        prompts = [replace(p, scored=0) for p in prompts]
    return list(batches(prompts, 1 if taylor else BATCH_TOKENS, multiple=ROUND))


def _run_groups(
    model,
    views,
    groups: list[Batch],
    sums,
    outputs: Outputs,
    taylor: bool,
    begin,
    course,
    label,
    quiet,
) -> None:
    total = sum(batch.tokens for batch in groups)
    with ExitStack() as stack:
        weights = weights_reduced(model, views, sums) if taylor else training_only(model)
        stack.enter_context(weights)
        stack.enter_context(outputs.watched())
        backward = stack.enter_context(loss_backward(model, views, groups))
        bar = stack.enter_context(progress_bar(total, label, "tok", quiet=quiet))
        # Longest first, as batches come: what later ones need fits where earlier ones were, where
        # any other order left the allocator with five times the memory in pieces.
        bar.update(sum(batch.tokens for batch in groups[: course.done]))
        for batch in course.over(groups):
            outputs.batch = batch
            if begin is not None:
                begin(batch)
            backward(batch)
            bar.update(batch.tokens)


def check_gradients(views: list[MLPView], sums: list[NeuronSums]) -> None:
    """Raise InputError where what `add_gradients` filled in holds NaN or Inf."""
    for view, mine in zip(views, sums, strict=True):
        found = [mine.gradient_gram.triu()] + ([] if mine.taylor is None else [mine.taylor])
        if not all(torch.isfinite(values).all() for values in found):
            raise InputError(f"{view.name}: its gradients hold NaN or Inf; use bf16 or fp32")


def _neurons(slot: Slot, tensor: torch.Tensor, width: int) -> torch.Tensor:
    """A slot's run of a tensor that has its parameter's shape."""
    matrix = tensor if slot.expert is None else tensor[slot.expert]
    return matrix.narrow(slot.axis, slot.start, width)


@contextmanager
def weights_reduced(
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

    weights = [many[0][1].parameter for many in slots.values()]
    with ExitStack() as stack:
        stack.enter_context(training_only(model, weights))
        for weight in weights:
            stack.callback(weight.register_post_accumulate_grad_hook(reduce).remove)
        yield


class Outputs:
    """The gradients at the MLPs' outputs, as the backward reaches them."""

    def __init__(
        self,
        views: list[MLPView],
        sums: list[NeuronSums] | None,
        prompts: Sequence[Tokens],
        squares: list[torch.Tensor | None],
    ):
        self.views, self.sums, self.squares = views, sums, squares
        lengths = torch.tensor([len(p.ids) for p in prompts])
        self.starts = (lengths.cumsum(0) - lengths).tolist()
        self.batch: Batch | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a backward adds Σ g gᵀ to `gradient_gram`, and keeps ‖g‖² of each token."""
        owners: dict[nn.Module, list[int]] = {}
        for index, view in enumerate(self.views):
            owners.setdefault(view.down_owner, []).append(index)
        with ExitStack() as stack:
            for owner, indices in owners.items():
                expert = self.views[indices[0]].kind == "experts"
                if expert and self.sums is None:
                    continue
                hook = self._experts_hook(indices) if expert else self._hook(indices[0])
                stack.callback(owner.register_forward_hook(hook).remove)
            yield

    def _hook(self, index: int):
        def gather(gradient: torch.Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            if self.sums is not None:
                ops.gram_update(self.sums[index].gradient_gram, rows)
            self._keep(index, rows.float().square().sum(-1).cpu())

        def watch(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(gather)

        return watch

    def _keep(self, index: int, squares: torch.Tensor) -> None:
        batch = self.batch
        rows = squares.view(len(batch.lengths), -1)
        for row, prompt, length in zip(rows, batch.index, batch.lengths, strict=True):
            start = self.starts[prompt]
            self.squares[index][start : start + length] = row[:length]

    def _experts_hook(self, indices: list[int]):
        """An expert's output enters the sum by its router's weight, and so does its gradient."""

        def watch(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            _, chosen, weights = arguments
            if output.requires_grad:
                output.register_hook(lambda gradient: gather(gradient, chosen, weights.detach()))

        def gather(gradient: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
            gradient = gradient.reshape(-1, gradient.shape[-1])
            for index in indices:
                rows, choice = torch.where(chosen == self.views[index].expert)
                own = gradient[rows].float() * weights[rows, choice, None].float()
                ops.gram_update(self.sums[index].gradient_gram, own)

        return watch
