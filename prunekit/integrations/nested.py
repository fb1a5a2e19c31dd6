"""Loads a nested checkpoint at any sparsity, reading only what that sparsity keeps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from prunekit.arch import find_mlps
from prunekit.checkpoint import RECORD, read_record
from prunekit.checkpoint.nested import NESTED, Nested
from prunekit.compact import prune
from prunekit.errors import InputError

logger = logging.getLogger(__name__)


def is_nested(folder: str | Path) -> bool:
    """Whether a folder is a nested checkpoint, or says that it is one and lost its file.

    Raises:
        InputError: it was written by prunekit, and its record is broken.
    """
    written = (Path(folder) / RECORD).is_file()
    return (Path(folder) / NESTED).is_file() or (written and "nested" in read_record(folder))


def load_nested(
    folder: str | Path,
    sparsity: float,
    shape: torch.nn.Module,
    *,
    multiple_of: int | None = None,
    repaired: bool = True,
) -> Any:
    """The model of a nested checkpoint at a sparsity, on the CPU, in the checkpoint's dtype.

    Args:
        folder: the checkpoint.
        sparsity: the fraction of neurons to leave on disk, 0 <= sparsity < 1.
        shape: the dense model on the meta device (`loading.load_shape`); pruned here.
        multiple_of: kept widths are rounded to it; None takes the checkpoint's own.
        repaired: take the repair of an anchor of just these widths, where there is one.

    Returns:
        The model; ``model.prunekit`` holds its plan, and ``bytes_read`` of the MLPs' matrices.

    Raises:
        InputError: no such checkpoint, or it is broken, or of another model than its configuration.

    Source:
        Matryoshka-like slicing as in MatFormer, arXiv 2310.07707, without its training.
    """
    nested = Nested.open(folder)
    multiple = multiple_of or nested.facts["recipe"]["multiple_of"]
    plan = nested.plan(sparsity, multiple)
    dense = tuple(view.width for view in find_mlps(shape, verify=False))
    if dense != plan.dense_widths:
        raise InputError(f"{folder}: {NESTED} and config.json are of different models")
    at_anchor = repaired and tuple(plan.widths()) in nested.anchors
    if repaired and nested.anchors and sparsity and not at_anchor:
        known = ", ".join(f"{1 - sum(w) / sum(dense):.1%}" for w in nested.anchors)
        logger.warning("%s: %.1f%% is not repaired; %s are", folder, 100 * plan.sparsity, known)
    state, read = nested.read(plan, repaired=repaired)
    prune(shape, plan, compensate="none")
    dtype = next(iter(state.values())).dtype
    options = {"config": shape.config, "dtype": dtype, "output_loading_info": True}
    try:
        model, told = type(shape).from_pretrained(None, state_dict=state, **options)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: does not fit its configuration: {reason}") from error
    if strange := sorted({*told["missing_keys"], *told["unexpected_keys"]}):
        raise InputError(f"{folder}: does not fit its configuration: {strange[0]}")
    method = nested.facts["recipe"]["compensate"] if at_anchor else "none"
    facts: dict[str, Any] = {"plan": plan, "compensate": method, "bytes_read": read}
    said = read_record(folder) if (Path(folder) / RECORD).is_file() else {}
    facts |= {name: said.get(name) for name in ("stats", "calibration")}
    facts |= {"model": said["model"]} if said else {}
    model.prunekit = facts
    model.config._name_or_path = str(folder)  # by which its origin is found
    return model
