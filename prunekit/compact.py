"""A plan becomes smaller weights, on a live model, through the gather operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunekit import ops
from prunekit.arch import (
    MLPView,
    Slot,
    blocks,
    check_finite,
    find_mlps,
    holds_attention,
    text_config,
)
from prunekit.compensate import (
    MINUTES,
    Heard,
    Repair,
    Teacher,
    check_budget,
    check_method,
    check_prompts,
    check_statistics,
    default_method,
    distill,
    repair,
    sequential,
)
from prunekit.errors import InputError
from prunekit.nn import CompactMLP
from prunekit.plan import PrunePlan
from prunekit.stats import NeuronStats

_WIDTH_ATTRIBUTES = ("intermediate_size", "intermediate_dim", "ffn_dim")


def prune(
    model: nn.Module,
    plan: PrunePlan,
    *,
    stats: NeuronStats | None = None,
    compensate: str | None = None,
    minutes: float = MINUTES,
    steps: int | None = None,
    quiet: bool = True,
) -> nn.Module:
    """Remove the neurons that a plan does not keep, in place, and repair the down projections.

    Args:
        model: the dense model that the plan was made for.
        plan: from `plan`.
        stats: what `calibrate` found; needed by every repair.
        compensate: none, bias, lstsq, sequential, or distill: sequential, then training to imitate
            the dense model on the calibration's prompts. None takes sequential where stats were
            calibrated with ``gram=True``, else none.
        minutes: how long distill trains.
        steps: how many steps it takes instead.
        quiet: no progress bar.

    Returns:
        The same model, smaller; ``model.prunekit`` records what was done.

    Raises:
        InputError: the plan or the statistics belong to another model, the repair lacks what it
            needs, or weights are not finite, before or after the repair; the model is then
            unchanged.

    Cost:
        2·F'·D·b bytes each for gate and up, D·(F + F')·b for down, and the repair's own. distill
        keeps what the dense model says (`Teacher`), 384 bytes a token, and not the dense model.
    """
    views = find_mlps(model, verify=False)
    plan.check_model(views)
    _check_equal_widths(views, plan)
    check_finite(model, views)
    if compensate is None:
        compensate = default_method(stats)
    check_method(compensate)
    check_statistics(compensate, views, stats)
    if compensate == "bias":
        _check_bias_slot(model, views)
    teacher = None
    if compensate == "distill":
        check_budget(minutes, steps)
        check_prompts("distill", views, stats)
        teacher = Teacher(stats.prompts)
    heard = None if teacher is None else teacher.hear
    fixes = repairs(model, views, plan, stats, compensate, heard=heard, quiet=quiet)
    with torch.no_grad():
        for indices in blocks(views):
            _compact_block(
                [views[i] for i in indices],
                [plan.kept[i] for i in indices],
                [fixes[i] for i in indices],
            )
    update_config(model, views, plan.widths(), opens_bias=compensate == "bias")
    model.prunekit = _record(plan, stats, compensate)
    if teacher is not None:
        taken = distill(model, views, teacher, minutes=minutes, steps=steps, quiet=quiet)
        model.prunekit |= {"distill_steps": taken.steps, "distill_share": taken.share}
    return model


def repairs(
    model: nn.Module,
    views: list[MLPView],
    plan: PrunePlan,
    stats: NeuronStats | None,
    method: str,
    *,
    heard: Heard | None = None,
    quiet: bool = False,
) -> list[Repair | None]:
    """What each MLP's down projection is to become when only the plan's neurons stay.

    Args:
        model: dense; as it was on return.
        views: its MLPs.
        plan: made for it.
        stats: of it; not needed for none.
        method: none, bias, lstsq, or sequential (distill begins with it).
        heard: told by sequential what the dense model says.
        quiet: no progress bar.

    Raises:
        InputError: a repair is not finite in the weights' dtype.
    """
    if method == "none":
        return [None] * len(views)
    if method in ("sequential", "distill"):
        fixes = sequential(model, views, plan.kept, stats, heard=heard, quiet=quiet)
    else:
        triples = zip(views, stats.target, plan.kept, strict=True)
        fixes = [repair(view, sums, kept, method) for view, sums, kept in triples]
    check_repairs(views, fixes)
    return fixes


def check_repairs(views: list[MLPView], fixes: list[Repair | None]) -> None:
    """No model is written whose repaired weights its own dtype cannot hold."""
    for view, fix in zip(views, fixes, strict=True):
        if fix is None:
            continue
        dtype = view.down.dtype
        parts = [fix.down] if fix.bias is None else [fix.down, fix.bias]
        if not all(torch.isfinite(part.to(dtype)).all() for part in parts):
            raise InputError(
                f"{view.name}: its repaired down projection is not finite in "
                f"{str(dtype).removeprefix('torch.')}; load the model in bf16 or fp32, or use "
                "--compensate none"
            )


def _record(plan: PrunePlan, stats: NeuronStats | None, compensate: str) -> dict[str, Any]:
    return {
        "plan": plan,
        "compensate": compensate,
        "stats": None if stats is None else stats.hash,
        "calibration": None if stats is None else stats.provenance,
    }


def _check_equal_widths(views: list[MLPView], plan: PrunePlan) -> None:
    """Experts that share a parameter must keep equally many neurons."""
    for indices in blocks(views):
        widths = {plan.kept[i].numel() for i in indices}
        if len(widths) > 1:
            raise InputError(
                f"{views[indices[0]].name}: the experts of a layer must keep equally many neurons, "
                f"got {sorted(widths)}"
            )


def _check_bias_slot(model: nn.Module, views: list[MLPView]) -> None:
    if all(view.down_bias is not None for view in views):
        return
    if hasattr(text_config(model), "mlp_bias") and all(v.kind == "gated" for v in views):
        return
    raise InputError(
        f"compensate bias: {type(model).__name__} has no bias on its down projection, and its "
        "configuration cannot give it one; use lstsq"
    )


def _compact_block(
    views: list[MLPView], kept: list[torch.Tensor], fixes: list[Repair | None]
) -> None:
    """Shrink every parameter that a block's views share; each parameter is rebuilt once."""
    parts: dict[tuple[int, str], list[tuple[Slot, torch.Tensor]]] = {}
    for view, indices in zip(views, kept, strict=True):
        done = _shrink_together(view, indices)
        for role, slot in view.slots.items():
            if role not in done:
                device_index = indices.to(slot.parameter.device)
                parts.setdefault((id(slot.owner), slot.name), []).append((slot, device_index))
    for members in parts.values():
        _shrink(members)
    for view, fix in zip(views, fixes, strict=True):
        if fix is not None:
            view.down.copy_(fix.down)
            _set_bias(view, fix.bias)
    width = kept[0].numel()
    for owner in {id(v.module): v.module for v in views}.values():
        for attribute in _WIDTH_ATTRIBUTES:
            if attribute in vars(owner):
                setattr(owner, attribute, width)


def _shrink_together(view: MLPView, kept: torch.Tensor) -> set[str]:
    """Shrink a layer's matrices in one operation, where each is a Linear's; return their roles."""
    roles = [role for role in ("gate", "up", "down") if role in view.slots]
    weights = [view.slots[role].parameter for role in roles]
    if view.kind not in ("gated", "plain") or len({w.device for w in weights}) > 1:
        return set()
    gate, *up, down = (weight.detach() for weight in weights)
    found = ops.compact_mlp(gate, up[0] if up else None, down, kept.to(gate.device))
    for role, new in zip(roles, (t for t in found if t is not None), strict=True):
        replace_parameter(view.slots[role], new)
    return set(roles)


def replace_parameter(slot: Slot, new: torch.Tensor) -> None:
    """Put another tensor in a parameter's place, and tell its module of its shape."""
    trained = slot.parameter.requires_grad
    setattr(slot.owner, slot.name, nn.Parameter(new, requires_grad=trained))
    _update_linear(slot.owner, slot.name)


def _shrink(members: list[tuple[Slot, torch.Tensor]]) -> None:
    slot = members[0][0]
    replace_parameter(slot, gathered(slot.parameter, members))


def gathered(
    parameter: torch.Tensor,
    members: list[tuple[Slot, torch.Tensor]],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A parameter with only the neurons that are kept of each run in it.

    Args:
        parameter: a matrix, a bias, or a stack of the experts' matrices.
        members: for each run of neurons where it lies and which of them stay, in order.
        out: where to put it.
    """
    if parameter.dim() < 3:
        return _gather(parameter, members, out)
    return torch.stack(
        [
            _gather(matrix, [(s, k) for s, k in members if s.expert == e])
            for e, matrix in enumerate(parameter)
        ],
        out=out,
    )


def _gather(
    matrix: torch.Tensor,
    members: list[tuple[Slot, torch.Tensor]],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep the named neurons of each run (gate, then up, in a fused matrix)."""
    index = torch.cat([kept.long() + slot.start for slot, kept in members])
    if matrix.dim() == 1:
        column = None if out is None else out[:, None]
        return ops.gather_rows(matrix[:, None], index, column)[:, 0]
    gather = ops.gather_rows if members[0][0].axis == 0 else ops.gather_cols
    return gather(matrix.detach(), index, out)


def _update_linear(owner: nn.Module, name: str) -> None:
    if name != "weight":
        return
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif hasattr(owner, "nf"):  # transformers' Conv1D
        owner.nx, owner.nf = owner.weight.shape


def _set_bias(view: MLPView, bias: torch.Tensor | None) -> None:
    if bias is None:
        return
    owner = view.down_owner
    if owner.bias is None:
        for slot in {id(s.owner): s for s in view.slots.values()}.values():
            weight = slot.owner.weight
            slot.owner.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))
    owner.bias.copy_(bias)


def update_config(
    model: nn.Module, views: list[MLPView], kept_widths: Sequence[int], *, opens_bias: bool = False
) -> None:
    """Have a model's configuration say what its MLPs' widths now are.

    Args:
        views: its MLPs.
        kept_widths: F' of each.
        opens_bias: its down projections got a bias that they did not have.
    """
    config = text_config(model)
    widths: dict[str, dict[int, set[int]]] = {}
    for view, width in zip(views, kept_widths, strict=True):
        widths.setdefault(view.width_key, {}).setdefault(view.layer, set()).add(width)
    for key, by_layer in widths.items():
        _set_widths(config, key, by_layer)
    if opens_bias and hasattr(config, "mlp_bias"):
        config.mlp_bias = True


def _set_widths(config: Any, key: str, by_layer: dict[int, set[int]]) -> None:
    """Say under one key what the MLPs' widths are; where they differ, by layer as transformers can.

    Experts of one layer that differ, and a transformers without ``per_layer_config``, leave no way:
    the configuration then stays as it was, and `checkpoint.save` refuses the model.
    """
    every = set.union(*by_layer.values())
    sayable = hasattr(type(config), "per_layer_config") and all(
        len(found) == 1 for found in by_layer.values()
    )
    if len(every) > 1 and not sayable:
        return
    said = config.to_dict().get("per_layer_config") if sayable else None
    overrides = {
        int(layer): {k: v for k, v in values.items() if k != key}
        for layer, values in (said or {}).items()
    }
    if len(every) > 1:
        for layer, (width,) in by_layer.items():
            overrides.setdefault(layer, {})[key] = width
    setattr(config, key, max(every))
    if sayable:
        config.per_layer_config = {k: v for k, v in overrides.items() if v} or None


def compact_modules(model: nn.Module, plan: PrunePlan | None = None) -> nn.Module:
    """Replace every MLP of a model by a `CompactMLP` over the same weights, in place.

    Args:
        model: any model whose MLPs are modules of their own with Linear projections.
        plan: prune by it first, without repair.

    Raises:
        InputError: an MLP cannot be replaced (experts, transposed Conv1D weights, or a layer that
            holds its projections itself); the model is then unchanged.
    """
    views = find_mlps(model)
    for view in views:
        if view.kind not in ("gated", "fused", "plain") or holds_attention(view.module):
            raise InputError(
                f"compact_modules: {view.name} ({view.kind}, {type(view.module).__name__}) is no "
                "module of its own with Linear projections; it runs as it is"
            )
    if plan is not None:
        prune(model, plan, compensate="none")
    replacements = {id(view.module): CompactMLP(view) for view in views}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replacements:
                compact = replacements[id(child)]
                compact.train(child.training)
                setattr(parent, name, compact)
    return model


@contextmanager
def trying(model: nn.Module, plan: PrunePlan) -> Iterator[nn.Module]:
    """Inside the block, a model uses only the neurons that a plan keeps; no weight changes.

    What `prune` without repair would give, at the price of an index: many plans can be tried on one
    model without copying it.

    Args:
        model: dense, its MLPs replaced by `compact_modules`.
        plan: made for this model.

    Raises:
        InputError: the plan belongs to another model, or an MLP is no CompactMLP.
    """
    views = find_mlps(model, verify=False)
    plan.check_model(views)
    for view in views:
        if not isinstance(view.module, CompactMLP):
            raise InputError(f"trying: {view.name} is no CompactMLP; call compact_modules first")
    try:
        for view, kept in zip(views, plan.kept, strict=True):
            view.module.kept = kept.to(view.gate.device)
        yield model
    finally:
        for view in views:
            view.module.kept = None
