"""Models that a sweep trains: the dense one that it begins with, and pruned ones afterwards."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.checkpoint import save
from prunekit.experiment.material import Material, corpus_of
from prunekit.experiment.protocol import Protocol
from prunekit.files import digest
from prunekit.integrations.loading import load
from prunekit.recover import recover


def cache_folder() -> Path:
    """Where made models are kept: PRUNEKIT_CACHE, or prunekit in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PRUNEKIT_CACHE") or Path(base) / "prunekit")


def made_model(protocol: Protocol, tokenizer: Any, *, quiet: bool = False) -> nn.Module:
    """The dense model of a protocol, trained first where it says so, or found in the cache.

    A training that was killed goes on from its last checkpoint, which lies in the cache too.

    Raises:
        InputError: the model or the corpus cannot be read, or the training fails.
    """
    if protocol.make is None:
        return load(protocol.model, dtype=protocol.dtype)
    corpus = corpus_of(protocol.make.corpus or protocol.target, tokenizer)
    settings = asdict(protocol.make.settings())
    made_from = [protocol.model, protocol.dtype, settings, corpus.hash]
    folder = cache_folder() / "models" / digest(made_from)
    if not (folder / "config.json").is_file():
        model = load(protocol.model, dtype=protocol.dtype)
        checkpoints = folder.with_suffix(".training")
        options = {"folder": checkpoints, "resume": True, "quiet": quiet}
        model = recover(model, tokenizer, corpus, **settings, **options)
        save(model, tokenizer, folder)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return load(folder, dtype=protocol.dtype)


def recovered(
    model: nn.Module,
    tokenizer: Any,
    protocol: Protocol,
    material: Material,
    dense: nn.Module,
    *,
    quiet: bool = False,
) -> nn.Module:
    """A trained copy of a pruned model; the model itself, and what it shares, stay as they are."""
    training = protocol.recovery
    settings = asdict(training.settings())
    corpus = corpus_of(training.corpus, tokenizer) if training.corpus else material.target
    teacher = dense if settings["method"] == "distill" else None
    return recover(
        copy.deepcopy(model), tokenizer, corpus, teacher=teacher, **settings, quiet=quiet
    )
