"""Models that a sweep trains: the dense one that it begins with, and pruned ones afterwards."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.checkpoint import save
from prunekit.experiment.material import Material, corpus_of
from prunekit.experiment.protocol import Protocol, Training
from prunekit.files import digest
from prunekit.integrations.transformers import load

_OPTIONS = ("preset", "epochs", "steps", "learning_rate", "batch", "accumulation")


def cache_folder() -> Path:
    """Where made models are kept: PRUNEKIT_CACHE, or prunekit in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PRUNEKIT_CACHE") or Path(base) / "prunekit")


def made_model(protocol: Protocol, tokenizer: Any, *, quiet: bool = False) -> nn.Module:
    """The dense model of a protocol, trained first where it says so, or found in the cache.

    Raises:
        InputError: the model or the corpus cannot be read, or the training fails.
    """
    if protocol.make is None:
        return load(protocol.model, dtype=protocol.dtype)
    from prunekit.recover import recover

    corpus = corpus_of(protocol.make.corpus or protocol.target, tokenizer)
    made_from = [protocol.model, protocol.dtype, asdict(protocol.make), corpus.hash]
    folder = cache_folder() / "models" / digest(made_from)
    if not (folder / "config.json").is_file():
        model = load(protocol.model, dtype=protocol.dtype)
        options = _options(protocol.make)
        model = recover(model, tokenizer, corpus, **options, quiet=quiet)
        save(model, tokenizer, folder, results={"made": asdict(protocol.make)})
    return load(folder, dtype=protocol.dtype)


def recovered(
    model: nn.Module, tokenizer: Any, protocol: Protocol, material: Material, dense: nn.Module
) -> nn.Module:
    """A trained copy of a pruned model; the model itself, and what it shares, stay as they are."""
    from prunekit.recover import recover

    training = protocol.recovery
    corpus = corpus_of(training.corpus, tokenizer) if training.corpus else material.target
    teacher = dense if training.method == "distill" else None
    options = _options(training)
    return recover(copy.deepcopy(model), tokenizer, corpus, teacher=teacher, **options, quiet=True)


def _options(training: Training) -> dict[str, Any]:
    given = {name: getattr(training, name) for name in _OPTIONS if getattr(training, name)}
    return {"method": training.method, "seed": training.seed, **given}
