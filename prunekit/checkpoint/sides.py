"""The sides of `prunekit diff`: a plan, or a model on disk, as what it keeps of a dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.arch import Slot, find_mlps, fingerprint, parameter_names
from prunekit.checkpoint.nested import NESTED, Nested
from prunekit.checkpoint.pieces import Assembled
from prunekit.checkpoint.save import PLAN, RECORD, read_record, weight_bytes
from prunekit.checkpoint.shards import Shards, has_weights
from prunekit.compact import prune
from prunekit.errors import InputError
from prunekit.plan import PrunePlan
from prunekit.tensors import DTYPES, Entry


@dataclass(frozen=True)
class Weights:
    """A model's tensors on disk, none of them read.

    Attributes:
        tensors: by the model's own names.
        members: of each parameter of an MLP, the runs of neurons in it, and of which MLP each is.
        widths: neurons that each MLP has on disk; of a padded model also those of zeros.
        alignable: whether all of that is on disk as the model names it, so that neurons can be
            found in it.
    """

    tensors: Mapping[str, Entry | Assembled]
    members: Mapping[str, list[tuple[Slot, int]]]
    widths: tuple[int, ...]
    alignable: bool


@dataclass(frozen=True)
class Side:
    """One of two plans or models.

    Attributes:
        path: as it was given.
        kind: plan, model or nested.
        dense_widths: F of each MLP of the dense model.
        widths: F' of each.
        kept: the neurons that each keeps, int32, ascending; None where nothing says which.
        recipe: how they were chosen and repaired, as far as it is known.
        fingerprint: of the dense model's MLPs; "" where nothing says it.
        record: what is in the model's ``prunekit.json``; {} without one.
        names: the MLPs' names; a plan knows none.
        parameters, bytes, dtype: of the model, and on disk; None for a plan.
        weights: None where there are no safetensors to read.
    """

    path: str
    kind: str
    dense_widths: tuple[int, ...]
    widths: tuple[int, ...]
    kept: tuple[torch.Tensor, ...] | None
    recipe: dict[str, Any]
    fingerprint: str
    record: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    parameters: int | None = None
    bytes: int | None = None
    dtype: str | None = None
    weights: Weights | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of the dense model's neurons that are gone."""
        return 1 - sum(self.widths) / sum(self.dense_widths)


def plan_side(path: str) -> Side:
    """A plan's file.

    Raises:
        InputError: it is none, or broken.
    """
    plan = PrunePlan.load(path)
    made_for = plan.recipe.get("fingerprint", "")
    widths = tuple(plan.widths())
    return Side(path, "plan", plan.dense_widths, widths, plan.kept, plan.recipe, made_for)


def model_side(path: str, shape: nn.Module, folder: str | Path | None) -> Side:
    """A model: dense, pruned or padded, by prunekit or not.

    Args:
        path: as it was given.
        shape: it on the meta device (`integrations.loading.load_shape`).
        folder: where its safetensors are; None where it has none.

    Raises:
        InputError: a file is broken, or plan and configuration are of different models.

    Cost:
        The headers are read, no tensor but the plan's.
    """
    views = find_mlps(shape, verify=False)
    found = tuple(view.width for view in views)
    record: dict[str, Any] = {}
    if folder is not None and (Path(folder) / RECORD).is_file():
        record = read_record(folder)
    pruned = "widths" in record
    dense = tuple(record["dense_widths"]) if pruned else found
    widths = tuple(record["widths"]) if pruned else found
    recipe = dict(record.get("recipe") or {})
    recipe.setdefault("stats", record.get("stats"))
    kept = None if pruned else tuple(torch.arange(width, dtype=torch.int32) for width in found)
    if pruned and (Path(folder) / PLAN).is_file():
        plan = PrunePlan.load(Path(folder) / PLAN)
        kept, dense, widths = plan.kept, plan.dense_widths, tuple(plan.widths())
    expected = (record["padded"],) * len(widths) if record.get("padded") else widths
    if found != expected or len(dense) != len(found):
        raise InputError(f"{path}: {RECORD}, {PLAN} and config.json are of different models")
    weights = size = None
    # Of others a configuration is enough; what prunekit wrote has weights, or is broken.
    if record or (folder is not None and has_weights(folder)):
        shards = Shards(folder)
        weights, size = _weights(shape, shards.entries), weight_bytes(folder)
    return Side(
        path,
        "model",
        dense,
        widths,
        kept,
        recipe if pruned else {},
        fingerprint(views, dense),
        record,
        tuple(view.name for view in views),
        sum(parameter.numel() for parameter in shape.parameters()),
        size,
        _dtype(weights),
        weights,
    )


def nested_side(
    path: str,
    shape: nn.Module,
    *,
    sparsity: float | None = None,
    widths: Sequence[int] | None = None,
) -> Side:
    """A nested checkpoint, as the model that it is at a sparsity or at given widths.

    Args:
        path: its folder.
        shape: the dense model on the meta device; pruned here.
        sparsity: as `prunekit.load` takes it.
        widths: F' of each MLP, where no sparsity is given; None takes all.

    Raises:
        InputError: it is broken, or of other MLPs than its configuration or the widths.
    """
    nested = Nested.open(path)
    views = find_mlps(shape, verify=False)
    dense = tuple(view.width for view in views)
    if dense != tuple(nested.facts["dense_widths"]):
        raise InputError(f"{path}: {NESTED} and config.json are of different models")
    if sparsity is None and widths is not None:
        if len(widths) != len(dense) or any(w > d for w, d in zip(widths, dense, strict=True)):
            raise InputError(f"{path}: has {mlps(dense)}, which have no {mlps(widths)}")
        plan = nested.first(widths)
    else:
        plan = nested.plan(sparsity or 0.0, nested.facts["recipe"]["multiple_of"])
    made = fingerprint(views)
    prune(shape, plan, compensate="none")
    weights = _weights(shape, nested.tensors(plan))
    kept = tuple(plan.widths())
    at_anchor = kept in nested.anchors
    recipe = plan.recipe if at_anchor else plan.recipe | {"compensate": "none"}
    return Side(
        path,
        "nested",
        dense,
        kept,
        plan.kept,
        recipe,
        made,
        read_record(path) if (Path(path) / RECORD).is_file() else {},
        tuple(view.name for view in views),
        sum(parameter.numel() for parameter in shape.parameters()),
        (Path(path) / NESTED).stat().st_size,
        _dtype(weights),
        weights,
    )


def mlps(widths: Sequence[int]) -> str:
    """How many MLPs there are and of what widths, in words."""
    return f"{len(widths)} MLPs of {', '.join(map(str, sorted(set(widths))))} neurons"


def _weights(shape: nn.Module, tensors: Mapping[str, Entry | Assembled]) -> Weights:
    views, names = find_mlps(shape, verify=False), parameter_names(shape)
    known = set(names.values())
    own = {}
    for name, tensor in tensors.items():
        # What was saved without its head lacks the prefix that the whole model gives.
        whole = f"{shape.base_model_prefix}.{name}"
        own[whole if name not in known and whole in known else name] = tensor
    members: dict[str, list[tuple[Slot, int]]] = {}
    for i, view in enumerate(views):
        for slot in view.slots.values():
            members.setdefault(names[id(slot.owner), slot.name], []).append((slot, i))
    plain = all(slot.expert is None for many in members.values() for slot, _ in many)
    widths = tuple(view.width for view in views)
    return Weights(own, members, widths, plain and members.keys() <= own.keys())


def _dtype(weights: Weights | None) -> str | None:
    """What most of the bytes are of."""
    if weights is None:
        return None
    sizes: dict[str, int] = {}
    for tensor in weights.tensors.values():
        entry = tensor if isinstance(tensor, Entry) else tensor.pieces[0].entry
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + tensor.size
    return str(DTYPES[max(sizes, key=sizes.get)]).removeprefix("torch.") if sizes else None
