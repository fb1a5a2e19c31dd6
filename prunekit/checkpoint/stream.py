"""Prunes a checkpoint on disk tensor by tensor: no more of it is in memory than one MLP."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit import files
from prunekit.arch import MLPView, Slot, all_finite, find_mlps, parameter_names
from prunekit.checkpoint.save import CARD, PLAN, RECORD, finish
from prunekit.checkpoint.shards import INDEX, Shards
from prunekit.compact import check_repairs, gathered, prune
from prunekit.compensate import check_method, check_statistics, repair
from prunekit.criteria.registry import score_views
from prunekit.errors import InputError
from prunekit.heap import trim
from prunekit.plan import PrunePlan
from prunekit.progress import progress_bar
from prunekit.stats import NeuronStats
from prunekit.tensors import Entry, Shard, read_shard, write_shard
from prunekit.values import parse_json

METHODS = ("none", "bias", "lstsq")  # what repairs an MLP without the model around it
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
OURS = (RECORD, PLAN, CARD, INDEX, files.MODEL_MARKER)


class Checkpoint:
    """A model on disk: its tensors, and the same model without weights.

    Args:
        folder: holds safetensors.
        shape: the model on the meta device (`integrations.loading.load_shape`).

    Raises:
        InputError: a file is broken, or an MLP's tensors are not in it under the model's names and
            of its shapes.
    """

    def __init__(self, folder: str | Path, shape: nn.Module):
        self.shards, self.shape = Shards(folder), shape
        self.views = find_mlps(shape, verify=False)
        self._names = parameter_names(shape)
        for view in self.views:
            for slot in view.slots.values():
                self.fitting(self._names[id(slot.owner), slot.name], slot.parameter)

    def entry(self, slot: Slot) -> Entry:
        """Where on disk the parameter of a slot lies."""
        return self._known(self._names[id(slot.owner), slot.name])

    def fitting(self, name: str, parameter: torch.Tensor) -> Entry:
        """Where on disk a tensor lies.

        Raises:
            InputError: it is not there, or not of the parameter's shape.
        """
        found = self._known(name)
        if found.shape != tuple(parameter.shape):
            raise InputError(
                f"{self.shards.folder}: {found.name} is {list(found.shape)}, but the "
                f"configuration says {list(parameter.shape)}"
            )
        return found

    def _known(self, name: str) -> Entry:
        if (found := self.find(name)) is not None:
            return found
        raise InputError(
            f"{self.shards.folder}: has no tensor {name}; its names are not those of "
            f"{type(self.shape).__name__}, so it cannot stay on disk: load it, without --no-load "
            "and --offload"
        )

    def find(self, name: str) -> Entry | None:
        """Where on disk a tensor lies that the model knows by this name."""
        bare = name.removeprefix(f"{self.shape.base_model_prefix}.")
        return self.shards.entries.get(name) or self.shards.entries.get(bare)

    def read(self, view: MLPView) -> MLPView:
        """A view over weights on disk: each is read when it is first looked at."""
        slots = {
            role: replace(slot, owner=_OnDisk({slot.name: self.entry(slot)}))
            for role, slot in view.slots.items()
        }
        owner = view.down_owner
        if view.down_bias is not None:
            owner = _OnDisk({"bias": self.entry(Slot(owner, "bias", 0))})
        return replace(view, slots=slots, down_owner=owner)

    def score(
        self, stats: NeuronStats | None, criterion: str, *, seed: int = 0
    ) -> list[torch.Tensor]:
        """As `criteria.score`, with the weights of one MLP at a time."""
        random = criterion == "random"  # which looks at no weight
        read = self.views if random else self._each()
        return score_views(stats, self.views, read, criterion, seed=seed)

    def _each(self) -> Iterator[MLPView]:
        """The views one after the other; what was made of each goes before the next is read."""
        for view in self.views:
            yield self.read(view)
            trim()


class _OnDisk:
    """Stands for a module: its parameters are read from disk when they are first asked for."""

    def __init__(self, entries: dict[str, Entry]):
        self._entries = entries

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("_") or name not in self._entries:
            raise AttributeError(name)
        setattr(self, name, self._entries[name].read())
        return vars(self)[name]


def check_streamed(method: str, option: str = "--no-load") -> None:
    """Raise InputError, of an option, unless a repair needs no more of a model than one MLP."""
    check_method(method)
    if method not in METHODS:
        raise InputError(
            f"{option}: compensate {method} runs the model; expected one of {', '.join(METHODS)}"
        )


def stream_prune(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    path: str | Path,
    *,
    stats: NeuronStats | None = None,
    compensate: str = "none",
    force: bool = False,
    quiet: bool = True,
) -> Path:
    """Write a pruned checkpoint: what `prune` and `save` give, without loading the model.

    Shards keep their names and their tensors' dtypes. A shard in which nothing changes is linked,
    or copied where it cannot be. Files that are neither weights nor prunekit's are carried over.

    Args:
        checkpoint: the dense model's; its ``shape`` is pruned too.
        plan: made for this model.
        path: the folder to write.
        stats: of the model, for a repair.
        compensate: none, bias (where the down projection has one) or lstsq.
        force: replace a folder that is not empty.
        quiet: no progress bar.

    Raises:
        InputError: as for `prune` and `save`, or a weight is not finite; nothing is written then.

    Cost:
        The checkpoint read and the smaller one written once; the largest tensor, its smaller self
        and, for a repair, fp64 copies of one down projection in memory.
    """
    check_streamed(compensate)
    plan.check_model(checkpoint.views)
    check_statistics(compensate, checkpoint.views, stats)
    work = _Work(checkpoint, plan, stats, compensate)
    prune(checkpoint.shape, plan, compensate="none")  # for the configuration and the record
    shape, shards = checkpoint.shape, checkpoint.shards
    shape.prunekit |= {"compensate": compensate, "stats": stats.hash if stats else None}
    shape.prunekit["calibration"] = stats.provenance if stats else None
    total = sum(entry.size for entry in shards)
    with (
        files.replacing_folder(path, force=force) as folder,
        progress_bar(total, "stream", "B", quiet=quiet) as bar,
    ):
        hashes: dict[str, str] = {}
        for shard in shards.shards:
            hashes |= _write(shard, folder, work, bar.update)
        if shards.sharded:
            _write_index(folder, shards)
        shape.config.save_pretrained(folder)
        _carry_over(shards.folder, folder)
        finish(folder, shape, hashes=hashes)
    return Path(path)


class _Work:
    """What becomes of each tensor."""

    def __init__(self, checkpoint: Checkpoint, plan: PrunePlan, stats, method: str):
        self.checkpoint, self.plan, self.stats, self.method = checkpoint, plan, stats, method
        self.members: dict[str, list[tuple[Slot, torch.Tensor]]] = {}
        self.repaired: dict[str, list[int]] = {}  # by tensor the MLPs whose repair it takes
        self._solved: dict[int, Any] = {}
        self._room = _Room()
        for i, (view, kept) in enumerate(zip(checkpoint.views, plan.kept, strict=True)):
            for role, slot in view.slots.items():
                name = checkpoint.entry(slot).name
                self.members.setdefault(name, []).append((slot, kept))
                if role == "down" and method != "none":
                    self.repaired.setdefault(name, []).append(i)
            if method != "none" and view.down_bias is not None:
                bias = checkpoint.entry(Slot(view.down_owner, "bias", 0)).name
                self.repaired.setdefault(bias, []).append(i)
            elif method == "bias":
                raise InputError(f"compensate bias: {view.name} has no bias on disk; use lstsq")

    def changes(self, name: str) -> bool:
        return name in self.members or name in self.repaired

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape that a tensor will have."""
        found = list(entry.shape)
        for slot, _ in self.members.get(entry.name, [])[:1]:
            same = [k for s, k in self.members[entry.name] if s.expert == slot.expert]
            found[slot.axis + (slot.expert is not None)] = sum(k.numel() for k in same)
        return tuple(found)

    def value(self, entry: Entry) -> torch.Tensor | Entry:
        """A tensor as it will be, or where it is copied from."""
        if not self.changes(entry.name):
            return entry
        old = entry.mapped()
        if old.is_floating_point() and not all_finite(old):
            raise InputError(f"{entry.path}: {entry.name} holds NaN or Inf; get it anew")
        members = self.members.get(entry.name)
        new = old
        if members is not None:
            new = gathered(old, members, self._room.take(self.shape(entry), old.dtype))
        for i in self.repaired.get(entry.name, []):
            self._repair(i, entry, new)
        return new

    def _repair(self, i: int, entry: Entry, new: torch.Tensor) -> None:
        """Put what a repair gives into a down projection, or into its bias."""
        view = self.checkpoint.views[i]
        slot = view.slots["down"]
        if i not in self._solved:
            read, sums = self.checkpoint.read(view), self.stats.target[i]
            self._solved[i] = repair(read, sums, self.plan.kept[i], self.method)
            check_repairs([read], [self._solved[i]])
            del read
            trim()
        # It is as large as the weights: kept no longer than until its bias has come by too.
        fix = self._solved[i] if view.down_bias is not None else self._solved.pop(i)
        if fix is None:
            return
        if entry.name != self.checkpoint.entry(slot).name:
            into, value = new, fix.bias
        else:
            into = new if slot.expert is None else new[slot.expert]
            value = fix.down if slot.axis == 1 else fix.down.T
        if value is not None:
            into.copy_(value)


class _Room:
    """Memory for two tensors, taken by turns: while one is written the next is made.

    Fresh memory for each would cost several times what is done there.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        if self._buffers[0].numel() < size:
            self._buffers[0] = torch.empty(size, dtype=torch.uint8)
        self._buffers.reverse()
        return self._buffers[1][:size].view(dtype).view(shape)


def _write(shard: Shard, folder: Path, work: _Work, advance: Callable) -> dict[str, str]:
    """Write one shard, and hash its tensors."""
    path = folder / shard.path.name
    if not any(work.changes(entry.name) for entry in shard.entries):
        hashes = {}
        for entry in shard.entries:
            hashes[entry.name] = entry.sha256()
            advance(entry.size)
        _link(shard.path, path)
        return hashes

    def contents() -> Iterator[torch.Tensor | Entry]:
        for entry in shard.entries:
            yield work.value(entry)
            advance(entry.size)

    planned = [(entry.name, entry.dtype, work.shape(entry)) for entry in shard.entries]
    return write_shard(path, planned, _ahead(contents()), shard.metadata)


def _ahead(values: Iterator) -> Iterator:
    """The values, each made in a thread while whoever takes them is busy with the one before."""
    end = object()
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, values, end)
        while (value := coming.result()) is not end:
            coming = worker.submit(next, values, end)
            yield value


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(source, target)


def _write_index(folder: Path, source: Shards) -> None:
    said = parse_json((source.folder / INDEX).read_text())
    shards = [read_shard(folder / shard.path.name) for shard in source.shards]
    size = sum(entry.size for shard in shards for entry in shard.entries)
    said["metadata"] = (said.get("metadata") or {}) | {"total_size": size}
    files.write_json(folder / INDEX, said)


def _carry_over(source: Path, folder: Path) -> None:
    """Copy the tokenizer and whatever else belongs to the model but is no weight."""
    for item in source.iterdir():
        known = item.name in OURS or item.suffix in WEIGHTS or item.name.endswith(".index.json")
        if known or item.name.startswith(".") or (folder / item.name).exists():
            continue
        if item.is_file():
            shutil.copyfile(item, folder / item.name)
