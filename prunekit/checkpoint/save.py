"""Saves a pruned model as a folder that plain transformers loads."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import files
from prunekit.checkpoint.card import model_card
from prunekit.checkpoint.shards import Shards
from prunekit.checkpoint.widths import check_widths, differ
from prunekit.checkpoint.writer import write_index
from prunekit.errors import CheckError, InputError
from prunekit.plan import PrunePlan

RECORD = "prunekit.json"
PLAN = "plan.safetensors"
CARD = "README.md"
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
    record = _record(model, results or {})
    record |= {"bytes": weight_bytes(folder), "sha256": hashes}
    plan: PrunePlan | None = (getattr(model, "prunekit", None) or {}).get("plan")
    if plan is not None:
        plan.save(folder / PLAN)
        write_index(folder)  # without one vLLM takes the plan's tensors for weights
    files.write_json(folder / RECORD, record)
    (folder / CARD).write_text(model_card(record))


def verify(folder: str | Path) -> int:
    """Hold every tensor of a saved model against the hash in its ``prunekit.json``.

    Returns:
        The number of tensors.

    Raises:
        InputError: a file is missing or broken, or the record has no hashes.
        CheckError: a tensor is not what was written.

    Cost:
        The weights read once.
    """
    said = read_record(folder).get("sha256")
    if not isinstance(said, dict):
        raise InputError(f"{folder}: its {RECORD} has no hashes to verify by")
    entries = Shards(folder).entries
    if missing := sorted(set(said) ^ set(entries)):
        raise CheckError(f"{folder}: its {RECORD} and its weights do not fit: {missing[0]}")
    for name, entry in entries.items():
        if entry.sha256() != said[name]:
            raise CheckError(f"{entry.path}: {name} is not what was written; get it anew")
    return len(entries)


def weight_bytes(folder: str | Path) -> int:
    """Bytes of a model folder's weights on disk."""
    return sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))


def _record(model: nn.Module, results: dict[str, Any]) -> dict[str, Any]:
    facts = getattr(model, "prunekit", None) or {}
    plan: PrunePlan | None = facts.get("plan")
    calibration = facts.get("calibration")
    record: dict[str, Any] = {
        "format": 1,
        "model": facts.get("model") or getattr(model.config, "_name_or_path", ""),
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    if plan is not None:
        record |= {
            "recipe": {**plan.recipe, **{k: facts[k] for k in _REPAIR if k in facts}},
            "sparsity": round(plan.sparsity, 6),
            "widths": plan.widths(),
            "dense_widths": list(plan.dense_widths),
            "widths_differ": differ(plan.dense_widths, plan.widths()) and "padded" not in facts,
            "padded": facts.get("padded"),
            "stats": facts["stats"],
            "calibration": calibration,
        }
    if "recovery" in facts:
        record["recovery"] = facts["recovery"]
    return record | {"results": results}


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
    if (Path(folder) / PLAN).is_file():
        facts |= {name: record[name] for name in ("stats", "calibration")}
        facts |= {k: record["recipe"][k] for k in _REPAIR if k in record["recipe"]}
        facts["plan"] = PrunePlan.load(Path(folder) / PLAN)
    model.prunekit = facts
    return model


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read a saved model's ``prunekit.json``.

    Raises:
        InputError: the folder has none, or it is no JSON.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise InputError(f"{folder}: no {RECORD}; it was not written by prunekit")
    return files.read_json(path)
