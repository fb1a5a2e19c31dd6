"""Nested checkpoints: neurons in the order of their scores; one file serves every sparsity.

``nested.safetensors`` holds each MLP's matrices with one neuron a row, the best first: what a
sparsity keeps are the first rows, and no others are read. For chosen anchors it also holds repaired
down projections. Beside it lie the dense model's configuration and tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit import files
from prunekit.arch import MLPView, Slot, find_mlps, parameter_names
from prunekit.checkpoint.pieces import Assembled, Piece
from prunekit.checkpoint.save import described, write_record
from prunekit.checkpoint.shards import NESTED
from prunekit.compact import repairs
from prunekit.compensate import Repair
from prunekit.errors import InputError
from prunekit.plan import PrunePlan, kept_width, plan
from prunekit.stats import NeuronStats
from prunekit.tensors import NAMES, Entry, read_shard, write_shard
from prunekit.values import conform, parse_json

_KIND, _VERSION = "nested", 1
_SLOT = {"stored": str, "name": str, "role": str, "rows": bool}
_FACTS = {
    "dense_widths": [int],
    "anchors": [[int]],
    "slots": [[_SLOT]],
    "biases": [(None, str)],
    "recipe": {"compensate": str, "multiple_of": int},
}


@dataclass(frozen=True)
class Nested:
    """A nested checkpoint, opened: its header was read, its weights were not.

    Attributes:
        folder: where it is.
        entries: every tensor's place.
        facts: what its writer said of it: dense widths, slots of the MLPs, anchors, recipe.
    """

    folder: Path
    entries: dict[str, Entry]
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Nested:
        """Read the header.

        Raises:
            InputError: there is no such file, or it is broken or of another kind.
        """
        path = Path(folder) / NESTED
        shard = read_shard(path)
        try:
            facts = parse_json(shard.metadata["prunekit"])
            conform(facts, {"kind": str, "version": int}, "header")
            if (facts["kind"], facts["version"]) != (_KIND, _VERSION):
                raise InputError(f"{path}: is of version {facts['version']}, expected {_VERSION}")
            _check_facts(facts)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: is no nested checkpoint") from None
        found = cls(Path(folder), {entry.name: entry for entry in shard.entries}, facts)
        found._check_entries()
        return found

    @property
    def anchors(self) -> list[tuple[int, ...]]:
        """The widths, an MLP each, for which there are repairs."""
        return [tuple(widths) for widths in self.facts["anchors"]]

    def _check_entries(self) -> None:
        for i, (width, slots) in enumerate(
            zip(self.facts["dense_widths"], self.facts["slots"], strict=True)
        ):
            for stored in [f"order.{i}", *(slot["stored"] for slot in slots)]:
                entry = self.entries.get(stored)
                if entry is None or not entry.shape or entry.shape[0] != width:
                    raise InputError(f"{self.folder / NESTED}: {stored} is not of {width} neurons")

    def plan(self, sparsity: float, multiple_of: int) -> PrunePlan:
        """The plan of a sparsity: the first neurons of every MLP.

        Raises:
            InputError: the sparsity is not in [0, 1), or an order is none.
        """
        if not 0 <= sparsity < 1:
            raise InputError(
                f"sparsity: got {sparsity}; expected a fraction with 0 <= sparsity < 1"
            )
        dense = self.facts["dense_widths"]
        counts = [kept_width(w, sparsity, multiple_of) if sparsity else w for w in dense]
        return self.first(counts, {"sparsity": sparsity})

    def first(self, widths: Sequence[int], recipe: dict[str, Any] | None = None) -> PrunePlan:
        """The plan that keeps the first so many neurons of each MLP.

        Raises:
            InputError: an order is none.
        """
        dense, kept = self.facts["dense_widths"], []
        for i, (width, count) in enumerate(zip(dense, widths, strict=True)):
            order = self.entries[f"order.{i}"].read()
            if order.dtype != torch.int32 or not torch.equal(
                order.sort().values, torch.arange(width, dtype=torch.int32)
            ):
                raise InputError(
                    f"{self.folder / NESTED}: order.{i} is no order of {width} neurons"
                )
            kept.append(order[:count].sort().values.int())
        return PrunePlan(tuple(kept), tuple(dense), self.facts["recipe"] | (recipe or {}))

    def tensors(self, plan: PrunePlan, *, repaired: bool = True) -> dict[str, Assembled]:
        """The weights of a plan of this checkpoint, by name, none of them read yet.

        Args:
            plan: from `plan` or `first`.
            repaired: take the repaired down projections, where the plan's widths are an anchor's.
        """
        widths = tuple(plan.widths())
        anchor = self.anchors.index(widths) if repaired and widths in self.anchors else None
        inside = {slot["stored"] for slots in self.facts["slots"] for slot in slots}
        parts = {
            name: [Piece(entry)]
            for name, entry in self.entries.items()
            if name not in inside and not name.startswith(("order.", "repair."))
        }
        for i, slots in enumerate(self.facts["slots"]):
            rank = self.entries[f"order.{i}"].read()[: widths[i]].argsort()
            for slot in slots:
                fixed = self._repair(anchor, i, slot)
                entry = _first(fixed or self.entries[slot["stored"]], widths[i])
                piece = Piece(entry, None if fixed else rank, slot["rows"], inside=True)
                parts.setdefault(slot["name"], []).append(piece)
            bias = self.entries.get(f"repair.{anchor}.{i}.bias")
            if bias is not None:
                parts[self.facts["biases"][i]] = [Piece(bias)]
        return {name: Assembled(tuple(pieces)) for name, pieces in parts.items()}

    def read(
        self, plan: PrunePlan, *, repaired: bool = True
    ) -> tuple[dict[str, torch.Tensor], int]:
        """The weights of a plan, as `tensors` finds them.

        Returns:
            The state dict, and the bytes of the MLPs' matrices that were read for it.

        Cost:
            What is returned, read once and rearranged.
        """
        found = self.tensors(plan, repaired=repaired)
        pieces = [piece for tensor in found.values() for piece in tensor.pieces]
        read = sum(piece.entry.size for piece in pieces if piece.inside)
        return {name: tensor.read() for name, tensor in found.items()}, read

    def _repair(self, anchor: int | None, i: int, slot: dict) -> Entry | None:
        if anchor is None or slot["role"] != "down":
            return None
        return self.entries.get(f"repair.{anchor}.{i}.down")


def _check_facts(facts: dict[str, Any]) -> None:
    conform(facts, _FACTS, "header")
    dense, anchors = facts["dense_widths"], facts["anchors"]
    lengths = {len(each) for each in (dense, facts["slots"], facts["biases"], *anchors)}
    least = min([facts["recipe"]["multiple_of"], *dense, *(w for each in anchors for w in each)])
    if lengths != {len(dense)} or not dense or least < 1:
        raise ValueError


def _first(entry: Entry, rows: int) -> Entry:
    """The first rows of a tensor."""
    if not entry.shape or rows > entry.shape[0]:
        raise InputError(f"{entry.path}: {entry.name} has fewer than {rows} rows")
    size = entry.size // max(entry.shape[0], 1) * rows
    return replace(entry, shape=(rows, *entry.shape[1:]), size=size)


def save_nested(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    scores: Sequence[torch.Tensor],
    *,
    stats: NeuronStats | None = None,
    anchors: Sequence[float] = (),
    compensate: str = "none",
    multiple_of: int = 64,
    recipe: dict[str, Any] | None = None,
    force: bool = False,
    quiet: bool = True,
) -> Path:
    """Write a nested checkpoint of a dense model.

    Args:
        model: dense; as it was on return.
        tokenizer: saved beside it; None saves none.
        path: the folder to write.
        scores: one [F] tensor an MLP.
        stats: of the model, for a repair.
        anchors: sparsities for which down projections are repaired and kept too.
        compensate: the repair: none, lstsq or sequential.
        multiple_of: the anchors' widths are rounded to it.
        recipe: further facts to record.
        force: replace a folder that is not empty.
        quiet: no progress bar.

    Raises:
        InputError: a mixture of experts, an anchor out of range, a repair that adds a bias where
            the model has none, or as for `prune`.

    Cost:
        The model's bytes written once, D·F' more an MLP and anchor, and the repairs' own.
    """
    views = find_mlps(model, verify=False)
    if any(view.kind == "experts" for view in views):
        raise InputError("nested: got a mixture of experts; expected MLPs of one matrix each")
    if compensate not in ("none", "lstsq", "sequential"):
        raise InputError(f"nested: got compensate {compensate}; expected none, lstsq or sequential")
    if anchors and compensate == "none":
        raise InputError("nested: anchors are what a repair is kept for; got compensate none")
    orders = [torch.argsort(s, descending=True, stable=True).int() for s in scores]
    plans = [plan(scores, s, multiple_of=multiple_of, recipe=recipe) for s in anchors]
    for chosen in plans:
        chosen.check_model(views)
    fixes = [repairs(model, views, p, stats, compensate, quiet=quiet) for p in plans]
    names = parameter_names(model)
    with files.replacing_folder(path, force=force) as folder:
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        facts = {
            "kind": _KIND,
            "version": _VERSION,
            "dense_widths": [view.width for view in views],
            "slots": [_slots(view, names) for view in views],
            "biases": [_bias_name(view, names) for view in views],
            "anchors": [p.widths() for p in plans],
            "recipe": {"compensate": compensate, "multiple_of": multiple_of, **(recipe or {})},
        }
        every = list(_tensors(model, views, orders, facts, fixes))
        planned = [(name, NAMES[t.dtype], tuple(t.shape)) for name, t, _ in every]
        contents = (t if order is None else t[order.to(t.device).long()] for _, t, order in every)
        metadata = {"format": "pt", "prunekit": json.dumps(facts)}
        hashes = write_shard(folder / NESTED, planned, contents, metadata)
        record = {
            "recipe": facts["recipe"],
            "nested": {key: facts[key] for key in ("dense_widths", "anchors")},
            "stats": stats.hash if stats else None,
            "calibration": stats.provenance if stats else None,
            "results": {},
        }
        write_record(folder, described(model) | record, hashes)
    return Path(path)


def _slots(view: MLPView, names: dict[tuple[int, str], str]) -> list[dict[str, Any]]:
    """How each of an MLP's matrices is stored, and which runs make up which parameter."""
    found = []
    for role, slot in sorted(view.slots.items(), key=lambda item: item[1].start):
        name = names[id(slot.owner), slot.name]
        found.append(
            {"stored": f"{name}/{role}", "name": name, "role": role, "rows": slot.axis == 0}
        )
    return found


def _bias_name(view: MLPView, names: dict[tuple[int, str], str]) -> str | None:
    return None if view.down_bias is None else names[id(view.down_owner), "bias"]


def _tensors(
    model: nn.Module,
    views: list[MLPView],
    orders: list[torch.Tensor],
    facts: dict[str, Any],
    fixes: list[list[Repair | None]],
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Name and value of each tensor, and the order its rows are to be written in: no copies."""
    inside = {slot["name"] for slots in facts["slots"] for slot in slots}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict().items():
        if name not in inside and name not in tied:
            yield name, tensor, None
    for i, (view, order) in enumerate(zip(views, orders, strict=True)):
        yield f"order.{i}", order, None
        for said in facts["slots"][i]:
            slot: Slot = view.slots[said["role"]]
            rows = slot.read(view.width).detach()
            yield said["stored"], rows if slot.axis == 0 else rows.T, order
    for a, many in enumerate(fixes):
        for i, (view, fix) in enumerate(zip(views, many, strict=True)):
            if fix is None:
                continue
            yield f"repair.{a}.{i}.down", fix.down.T.to(view.down.dtype), None
            if fix.bias is not None:
                yield f"repair.{a}.{i}.bias", fix.bias.to(view.down.dtype), None
