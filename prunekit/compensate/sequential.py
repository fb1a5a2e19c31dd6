"""Repair layer by layer: each down projection sees what the pruned layers before it give.

Least squares on dense activations (`lstsq`) repairs every MLP as if the others were whole, so the
errors of a deep model add up. Here layer l's kept activations come from the model whose layers
before l are already pruned and repaired, and they aim at the dense model's hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from prunekit.arch import MLPView, decoder_layers, members
from prunekit.backward import calling_instead
from prunekit.batching import Batch, batches
from prunekit.compensate.base import Heard, Repair, check_prompts
from prunekit.compensate.importance import token_weights
from prunekit.compensate.lstsq import lstsq
from prunekit.compensate.regression import Regression
from prunekit.compensate.streams import (
    Calls,
    Narrowed,
    in_fp32,
    logits_after,
    record_calls,
    watched,
)
from prunekit.ops.quick import quick_products
from prunekit.progress import progress_bar
from prunekit.stats import NeuronStats

logger = logging.getLogger(__name__)

BLEND = 0.75  # of the earlier layers' error in the residual stream that an MLP is to make good
BATCH_TOKENS = 1024
HELD_OUT = 5  # every fifth batch chooses the ridge


@quick_products()
@torch.no_grad()
def sequential(
    model: nn.Module,
    views: Sequence[MLPView],
    kept: Sequence[torch.Tensor],
    stats: NeuronStats,
    *,
    heard: Heard | None = None,
    quiet: bool = False,
) -> list[Repair | None]:
    """Repair every down projection for the neurons that stay, from the first layer to the last.

    With h the activations in the model pruned so far, y and r the dense MLP's output and what the
    dense layer adds it to, r̃ the same in the pruned model, and a weight w for every token:
    W' = argmin Σ w ‖y + BLEND·(r - r̃) - W'·h[S]‖² + ridge. Tokens weigh as the loss gradient at
    the MLP's output does (`importance`), the ridge is chosen by held-out prompts (`regression`).

    Experts, and MLPs that share a layer with them, are repaired by `lstsq`. Where a layer does more
    to its MLP's output than add it, BLEND is 0.

    Args:
        model: the dense model; as it was, bit for bit, on return and on error.
        views: its MLPs.
        kept: for each of them the neurons that stay.
        stats: with Gram matrices and prompts.
        heard: told the dense model's logits, [B, S, V] in its dtype, on each batch of the prompts.
        quiet: no progress bar.

    Raises:
        InputError: the statistics hold no prompts, or weights are offloaded or quantised.

    Cost:
        Two forwards of the decoder, the second without down projections and, where gate and up are
        plain Linears, for the neurons that stay; a backward where the statistics hold no gradients;
        T·F'² + 6·T·D·F' FLOP an MLP and the solution's own. 8·T·D bytes of hidden states, T·F' of
        activations in the weights' precision, two layers in fp32.
        Where it is heard, the lm_head's 2·T·V·D FLOP.

    Source:
        Asymmetric calibration: GPTAQ, Li et al., arXiv 2504.02692, for neurons instead of grids.
    """
    with walked(model, views, kept, stats, whole=True, quiet=quiet) as walk:
        if heard is not None:
            for batch, hidden in zip(walk.groups, walk.dense, strict=True):
                heard(batch, logits_after(model, walk.layers, batch, hidden))
        return walk.repairs


@dataclass
class Walk:
    """What a walk through the layers leaves: the streams are at the last layer's end."""

    layers: Sequence[nn.Module]
    groups: list[Batch]
    repairs: list[Repair | None]
    dense: list[torch.Tensor]
    pruned: list[torch.Tensor]


@contextmanager
def walked(model, views, kept, stats, *, whole: bool, quiet: bool) -> Iterator[Walk]:
    """Inside, the down projections are the repaired ones, with zeros for what goes.

    With ``whole`` False what chooses the ridge repairs nothing: every fifth batch of prompts.
    """
    check_prompts("sequential", views, stats)
    layers = decoder_layers(model, list(views))
    inside = [members(layer, views) for layer in layers]
    alone = [m[0] for m in inside if len(m) == 1 and views[m[0]].kind != "experts"]
    groups = _groups(stats)
    was_training = model.training
    model.eval()
    try:
        found = token_weights(model, views, stats, quiet=quiet)
        weights = {i: _by_batch(found[i], stats, groups) for i in alone}
        with _restored([views[i] for m in inside for i in m]):
            calls = record_calls(model, layers, groups)
            dense = [call.hidden for call in calls]
            walk = Walk(layers, groups, [None] * len(views), dense, list(dense))
            _walk(walk, views, kept, stats, inside, weights, calls, whole, quiet)
            yield walk
    finally:
        model.train(was_training)


def _groups(stats: NeuronStats) -> list[Batch]:
    """Batches; of few prompts small ones, so that some can be held out and some are left."""
    total = sum(len(p.ids) for p in stats.prompts)
    return list(batches(stats.prompts, min(BATCH_TOKENS, total // (2 * HELD_OUT) + 1)))


def _by_batch(weights: torch.Tensor, stats: NeuronStats, groups) -> list[torch.Tensor]:
    prompts = weights.split([len(p.ids) for p in stats.prompts])
    return [torch.cat([prompts[i] for i in batch.index]) for batch in groups]


@contextmanager
def _restored(views: Sequence[MLPView]) -> Iterator[None]:
    """Inside, down projections may be overwritten; after, they are what they were."""
    before = [(view, view.down.clone(), _copy(view.down_bias)) for view in views]
    try:
        yield
    finally:
        for view, down, bias in before:
            view.down.copy_(down)
            if bias is not None:
                view.down_bias.copy_(bias)


def _copy(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().clone()


def _walk(walk: Walk, views, kept, stats, inside_of, weights, calls, whole: bool, quiet: bool):
    layers, repairs, dense, pruned = walk.layers, walk.repairs, walk.dense, walk.pruned
    tokens = sum(int(call.counted.sum()) for call in calls)
    with progress_bar(
        len(layers) * tokens, "repair" if whole else "rehearsal", "tok", quiet=quiet
    ) as bar:
        for number, (layer, inside) in enumerate(zip(layers, inside_of, strict=True)):
            if len(inside) == 1 and inside[0] in weights:
                i = inside[0]
                step = _Layer(layer, number, views[i], kept[i].long(), calls)
                repairs[i] = step.repair(dense, pruned, weights[i], bar, whole)
                _install(views[i], kept[i].long(), repairs[i])
                step.move_on(pruned)
            else:
                for i in inside:
                    if stats.target[i].tokens:
                        repairs[i] = lstsq(views[i], stats.target[i], kept[i].long())
                _run_on(layer, number, calls, dense)
                bar.update(tokens)
                for i in inside:
                    _install(views[i], kept[i].long(), repairs[i])
                _run_on(layer, number, calls, pruned)


def _run_on(layer: nn.Module, number: int, calls: list[Calls], hidden: list[torch.Tensor]) -> None:
    with in_fp32(layer):
        hidden[:] = [c.run(layer, number, x) for c, x in zip(calls, hidden, strict=True)]


def _install(view: MLPView, kept: torch.Tensor, repair: Repair | None) -> None:
    """Give the full-width projection the pruned one's results: zeros for what goes."""
    down = view.down
    columns = down[:, kept.to(down.device)] if repair is None else repair.down.to(down)
    down.zero_()
    down[:, kept.to(down.device)] = columns
    if repair is not None and repair.bias is not None:
        view.down_bias.copy_(repair.bias)


class _Layer:
    """One decoder layer with one MLP, in both models."""

    def __init__(self, layer, number: int, view: MLPView, kept: torch.Tensor, calls: list[Calls]):
        self.layer, self.number, self.view, self.calls = layer, number, view, calls
        self.kept = kept.to(view.down.device)
        # As the products take it: fp32 is rounded to bf16 there where the weights are bf16.
        self.dtype = torch.bfloat16 if view.down.dtype == torch.bfloat16 else torch.float32
        self.activations: list[torch.Tensor] = []  # [B·S, F'] in the pruned model, if it is enough

    def repair(self, dense, pruned, weights, bar, whole: bool) -> Repair | None:
        """Solve for this layer's down projection, and move the dense stream on past it."""
        with in_fp32(self.layer), watched(self.view.down_owner) as seen:
            adds = self._adds(pruned[-1])
            blend = BLEND if adds else 0.0
            down, bias = self.view.down[:, self.kept], self.view.down_bias
            device = down.device
            problem = Regression(*down.shape, device, intercept=bias is not None)
            narrowed = Narrowed(self.view, self.kept) if adds else nullcontext()
            for b, call in enumerate(self.calls):
                rows = call.counted
                out = call.run(self.layer, self.number, dense[b])
                aim = seen["y"][rows].float()
                if blend:
                    aim = aim + blend * (_rows(out, rows) - aim)
                dense[b] = out
                with narrowed, self._silent() if adds else nullcontext():
                    out = call.run(self.layer, self.number, pruned[b])
                h = seen["h"]
                if h.shape[1] != self.kept.numel():
                    h = h[:, self.kept]
                if adds:
                    pruned[b] = out
                    aim = aim - blend * _rows(pruned[b], rows)
                    self.activations.append(h.to(self.dtype))
                h = h[rows].float()
                error = aim - torch.nn.functional.linear(h, down, bias)
                problem.add(h, error, weights[b].to(device), held_out=b % HELD_OUT == 0)
                bar.update(int(rows.sum()))
            solution = problem.solve(whole=whole)
        if solution is None:
            logger.warning("%s: its activations are all 0; left unrepaired", self.view.name)
            return None
        change, shift = solution
        new = down.double().cpu() + change
        return Repair(new, None if bias is None else bias.double().cpu() + shift)

    def move_on(self, pruned: list[torch.Tensor]) -> None:
        """Move the pruned stream past the layer, whose down projection is now repaired."""
        if not self.activations:
            _run_on(self.layer, self.number, self.calls, pruned)
            return
        with in_fp32(self.layer):
            down, bias = self.view.down[:, self.kept], self.view.down_bias
            for b, h in enumerate(self.activations):
                pruned[b] += torch.nn.functional.linear(h.float(), down, bias).view(pruned[b].shape)
        self.activations.clear()

    def _silent(self) -> AbstractContextManager[None]:
        """Inside, the layer gives what its MLP's output would be added to."""
        outputs = self.view.down.shape[0]
        return calling_instead(self.view.down_owner, lambda h: h.new_zeros(*h.shape[:-1], outputs))

    def _adds(self, hidden: torch.Tensor) -> bool:
        """Whether what the layer gives moves by just as much as its MLP's output does."""
        call, owner = self.calls[-1], self.view.down_owner
        out = call.run(self.layer, self.number, hidden)
        move: list[torch.Tensor] = []

        def shift(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(output.shape, generator=generator).to(output)
            move.append(noise * output.square().mean().sqrt())
            return output + move[0]

        with ExitStack() as stack:
            stack.callback(owner.register_forward_hook(shift).remove)
            moved = call.run(self.layer, self.number, hidden) - out
        wanted = move[0].reshape(moved.shape)
        return bool((moved - wanted).norm() <= 1e-2 * wanted.norm())


def _rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden.reshape(-1, hidden.shape[-1])[rows]
