"""Saves a pruned model as a folder that plain transformers loads."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import files
from prunekit.checkpoint.card import model_card
from prunekit.checkpoint.origin import origin
from prunekit.checkpoint.shards import NESTED, Shards, write_index
from prunekit.checkpoint.widths import check_widths, differ
from prunekit.errors import CheckError, InputError
from prunekit.plan import PrunePlan
from prunekit.tensors import Shard, read_shard
from prunekit.values import conform

RECORD = "prunekit.json"
PLAN = "plan.safetensors"
CARD = "README.md"
_VERSIONS = ("prunekit", "torch", "transformers")
_SAID = {"format": int, "model": str, "parameters": int, "bytes": int, "dtype": str}
_SAID_OF_PRUNING = {
    "widths": [int],
    "dense_widths": [int],
    "sparsity": float,
    "recipe": dict,
    "stats": (None, str),
    "calibration": object,
}
_SAID_OF_RECOVERY = {
    "settings": {"method": str},
    "steps": int,
    "loss": {"before": float, "after": float},
}
_REPAIR = ("compensate", "distill_steps", "distill_share")  # of the recipe, recorded by `prune`


def save(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    results: dict[str, Any] | None = None,
    beside: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write model, tokenizer, plan, ``prunekit.json`` and model card; the folder appears whole.

    Args:
        model: a model that `prune` has shrunk, or a dense one.
        tokenizer: saved beside it; None saves none.
        path: the folder to write.
        results: measurements to record, such as `evaluate`'s.
        beside: a folder whose files are put beside the model's.
        force: replace a folder that is not empty.

    Returns:
        The path.

    Raises:
        InputError: the folder is not empty and ``force`` is not set, it cannot be written, or the
            widths differ by layer in a model that could then not be loaded.

    Cost:
        The model's bytes, written once.
    """
    check_widths(model)
    with files.replacing_folder(path, force=force) as folder:
        try:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
        if beside is not None:
            shutil.copytree(beside, folder, dirs_exist_ok=True)
        hashes = {entry.name: entry.sha256() for entry in Shards(folder)}
        finish(folder, model, hashes=hashes, results=results)
    return Path(path)


def finish(
    folder: Path,
    model: nn.Module,
    *,
    hashes: dict[str, str],
    results: dict[str, Any] | None = None,
) -> None:
    """Put plan, ``prunekit.json`` and model card beside weights that were written.

    Args:
        folder: where they are.
        model: what they are of; it may be without weights.
        hashes: sha256 of every tensor, by name.
        results: measurements to record.
    """
    plan: PrunePlan | None = (getattr(model, "prunekit", None) or {}).get("plan")
    if plan is not None:
        plan.save(folder / PLAN)
        write_index(folder)  # without one vLLM takes the plan's tensors for weights
    record = described(model) | _pruning(model) | {"results": results or {}}
    write_record(folder, record, hashes)


def write_record(folder: Path, record: dict[str, Any], hashes: dict[str, str]) -> None:
    """Write ``prunekit.json`` and the model card of it.

    Args:
        folder: where the weights are.
        record: what is said of them.
        hashes: sha256 of every tensor, by name.
    """
    headers = {shard.path.name: shard.sha256 for shard in _shards(folder)}
    record = record | {"bytes": weight_bytes(folder), "headers": headers, "sha256": hashes}
    files.write_json(folder / RECORD, record)
    (folder / CARD).write_text(model_card(record))


def verify(folder: str | Path) -> int:
    """Hold every tensor of a saved model, and what its files say of them, against their hashes.

    Returns:
        The number of tensors.

    Raises:
        InputError: a file is missing or broken, or the record has no hashes.
        CheckError: a tensor is not what was written.

    Cost:
        The weights read once.
    """
    record = read_record(folder)
    said, headers = record.get("sha256"), record.get("headers", {})
    if not isinstance(said, dict) or not isinstance(headers, dict):
        raise InputError(f"{folder}: its {RECORD} has no hashes to verify by")
    shards = _shards(Path(folder))
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    if missing := sorted(set(said) ^ set(entries)):
        raise CheckError(f"{folder}: its {RECORD} and its weights do not fit: {missing[0]}")
    for shard in shards:
        if headers and headers.get(shard.path.name) != shard.sha256:
            raise CheckError(f"{shard.path}: its header is not what was written; get it anew")
    for name, entry in entries.items():
        if entry.sha256() != said[name]:
            raise CheckError(f"{entry.path}: {name} is not what was written; get it anew")
    return len(entries)


def _shards(folder: Path) -> list[Shard]:
    """The files of weights of a model, or of a nested checkpoint."""
    nested = folder / NESTED
    return [read_shard(nested)] if nested.is_file() else Shards(folder).shards


def weight_bytes(folder: str | Path) -> int:
    """Bytes of a model folder's weights on disk."""
    names = ("model*.safetensors", NESTED)
    return sum(path.stat().st_size for name in names for path in Path(folder).glob(name))


def described(model: nn.Module) -> dict[str, Any]:
    """What a record says of any model: what it is of, and how large."""
    facts = getattr(model, "prunekit", None) or {}
    source = getattr(model.config, "_name_or_path", "") or ""
    known = getattr(model, "origin", None) or origin(source)
    return {
        "format": 1,
        "model": facts.get("model") or source,
        **known.metadata(),
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {name: _version(name) for name in _VERSIONS},
    }


def _pruning(model: nn.Module) -> dict[str, Any]:
    """What was done to a model, as far as it remembers."""
    facts = getattr(model, "prunekit", None) or {}
    plan: PrunePlan | None = facts.get("plan")
    recovery = {"recovery": facts["recovery"]} if "recovery" in facts else {}
    if plan is None:
        return recovery
    return {
        "recipe": {**plan.recipe, **{k: facts[k] for k in _REPAIR if k in facts}},
        "sparsity": round(plan.sparsity, 6),
        "widths": plan.widths(),
        "dense_widths": list(plan.dense_widths),
        "widths_differ": differ(plan.dense_widths, plan.widths()) and "padded" not in facts,
        "padded": facts.get("padded"),
        "stats": facts["stats"],
        "calibration": facts.get("calibration"),
        **recovery,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a copy that nobody installed
        return "0+unknown"


def remember(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a model that was loaded from a folder what the folder records of its pruning.

    So that what is saved after more work on it tells of both. A folder that prunekit did not write,
    or anything else that a model is loaded from, records nothing.

    Raises:
        InputError: the record or the plan is broken.
    """
    if not (Path(folder) / RECORD).is_file():
        return model
    record = read_record(folder)
    facts: dict[str, Any] = {"model": record["model"]}
    facts |= {key: record[key] for key in ("recovery",) if key in record}
    if (Path(folder) / PLAN).is_file():
        facts |= {name: record[name] for name in ("stats", "calibration")}
        facts |= {k: record["recipe"][k] for k in _REPAIR if k in record["recipe"]}
        facts["plan"] = PrunePlan.load(Path(folder) / PLAN)
    model.prunekit = facts
    return model


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read a saved model's ``prunekit.json``.

    Raises:
        InputError: the folder has none, or it is no JSON, or lacks what every record says.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise InputError(f"{folder}: no {RECORD}; it was not written by prunekit")
    record = files.read_json(path)
    try:
        conform(record, _SAID | {"recovery?": _SAID_OF_RECOVERY}, "it")
        if "widths" in record:
            _conform_pruning(record)
    except ValueError as error:
        raise InputError(f"{path}: is no record of a model: {error}") from None
    return record


def _conform_pruning(record: dict[str, Any]) -> None:
    """Raise ValueError where a record does not say of its pruning what every one does."""
    conform(record, _SAID_OF_PRUNING, "it")
    if not record["widths"] or len(record["widths"]) != len(record["dense_widths"]):
        raise ValueError("its widths are none of its dense widths")
