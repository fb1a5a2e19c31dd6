"""Saves a pruned model as a folder that plain transformers loads."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from prunekit import files
from prunekit.arch import find_mlps, text_config
from prunekit.checkpoint.card import model_card
from prunekit.errors import InputError
from prunekit.plan import PrunePlan

RECORD = "prunekit.json"
PLAN = "plan.safetensors"
CARD = "README.md"
_REPAIR = ("compensate", "distill_steps")  # of the recipe, recorded by `prune`


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
            widths differ by layer, which the model's configuration cannot say.

    Cost:
        The model's bytes, written once.
    """
    _check_widths(model)
    record = _record(model, results or {})
    plan: PrunePlan | None = (getattr(model, "prunekit", None) or {}).get("plan")
    with files.replacing_folder(path, force=force) as folder:
        try:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
        record["bytes"] = weight_bytes(folder)
        if beside is not None:
            shutil.copytree(beside, folder, dirs_exist_ok=True)
        if plan is not None:
            plan.save(folder / PLAN)
        files.write_json(folder / RECORD, record)
        (folder / CARD).write_text(model_card(record))
    return Path(path)


def weight_bytes(folder: str | Path) -> int:
    """Bytes of a model folder's weights on disk."""
    return sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))


def _check_widths(model: nn.Module) -> None:
    config = text_config(model)
    for view in find_mlps(model, verify=False):
        expected = getattr(config, view.width_key, None)
        if expected is not None and expected != view.width:
            refuse_differing_widths(
                f"save: {view.name} has {view.width} neurons where {view.width_key} says {expected}"
            )


def refuse_differing_widths(what: str) -> NoReturn:
    """Raise the InputError of every attempt to save MLPs of several widths."""
    raise InputError(
        f"{what}; a plain checkpoint holds MLPs of one width only: take --allocation uniform, or "
        "use the model where it is (prunekit.prune, compact_modules, evaluate)"
    )


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
