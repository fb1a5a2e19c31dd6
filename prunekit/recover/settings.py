"""The hyperparameters of a recovery: what each method defaults to, and the paper's presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from prunekit.errors import InputError

METHODS = ("lora", "full", "distill")
DTYPES = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Settings:
    """Everything that, with the model and the data, decides the weights that come out.

    Attributes:
        method: lora, full or distill.
        epochs: passes over the data.
        steps: optimiser steps instead; 0: as many as the epochs take.
        learning_rate: reached after the warm-up; falls to zero along a cosine.
        batch: examples of a forward and backward, per process.
        accumulation: batches of an optimiser step.
        warmup: share of the steps in which the learning rate rises.
        max_length: tokens of an example that are read.
        limit: examples that are read; 0: all.
        rank, alpha, dropout: of LoRA: delta = alpha / rank · B·A.
        logits_weight: of distill: of the divergence from the dense model's next-token
            probabilities, in nats a token.
        hidden_weight: of distill: of the squared error of a layer's output, relative to the square
            of what the dense model's is there, mean over layers and tokens.
        dtype: what products are computed in: bf16, fp32, or auto: bf16 where the hardware has it.
        seed: orders the examples, draws LoRA's first weights and its dropout.
    """

    method: str = "lora"
    epochs: float = 1.0
    steps: int = 0
    learning_rate: float = 2e-4
    batch: int = 8
    accumulation: int = 1
    warmup: float = 0.03
    max_length: int = 1024
    limit: int = 0
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    logits_weight: float = 1.0
    hidden_weight: float = 1.0
    dtype: str = "auto"
    seed: int = 0


# Where a method's defaults differ from those above.
_OF_METHOD: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"learning_rate": 1e-4},
    "distill": {"learning_rate": 3e-4},
}

# arXiv 2604.27115; it names no warm-up, so the default stands.
_OF_PAPER = {"method": "lora", "rank": 16, "alpha": 32.0, "max_length": 1024, "dtype": "bf16"}
PRESETS: dict[str, dict[str, Any]] = {
    "paper-math": _OF_PAPER
    | {"epochs": 3.0, "learning_rate": 2e-5, "dropout": 0.10, "batch": 2, "accumulation": 4},
    "paper-code": _OF_PAPER
    | {"epochs": 2.0, "learning_rate": 2e-4, "dropout": 0.05, "batch": 2, "accumulation": 8}
    | {"limit": 7000},
    "arithmetic": {"method": "full", "learning_rate": 3e-4, "batch": 32},
}


def resolve(preset: str | None = None, **given: Any) -> Settings:
    """Combine a method's defaults, a preset, and what was given itself; the last wins.

    Args:
        preset: a name in ``PRESETS``, or none.
        given: fields of `Settings`; None is not given.

    Raises:
        InputError: an unknown preset, method or dtype, or a number out of range.
    """
    if preset and preset not in PRESETS:
        raise InputError(f"preset: got {preset!r}; expected one of {', '.join(PRESETS)}")
    chosen = PRESETS[preset] if preset else {}
    chosen = chosen | {name: value for name, value in given.items() if value is not None}
    method = chosen.get("method", Settings.method)
    _check_choice("method", method, METHODS)
    found = replace(Settings(), **{**_OF_METHOD[method], **chosen})
    _check(found)
    return found


def _check(found: Settings) -> None:
    _check_choice("dtype", found.dtype, DTYPES)
    positive = ("epochs", "learning_rate", "rank", "alpha", "batch", "accumulation")
    for name in (*positive, "max_length"):
        value = getattr(found, name)
        if not 0 < value < math.inf:
            raise InputError(f"{name}: got {value}; expected more than 0")
    for name in ("steps", "limit", "logits_weight", "hidden_weight"):
        value = getattr(found, name)
        if not 0 <= value < math.inf:
            raise InputError(f"{name}: got {value}; expected 0 or more")
    for name in ("warmup", "dropout"):
        value = getattr(found, name)
        if not 0 <= value < 1:
            raise InputError(f"{name}: got {value}; expected a share with 0 <= share < 1")
    if found.logits_weight + found.hidden_weight == 0:
        raise InputError("logits_weight and hidden_weight: got 0 and 0; expected one above 0")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: got {value!r}; expected one of {', '.join(choices)}")


def differences(now: dict[str, Any], before: dict[str, Any]) -> str:
    """What two runs do not share, as words; empty where they are the same."""
    names = [name for name in {**before, **now} if now.get(name) != before.get(name)]
    return ", ".join(f"{name} {now.get(name)} (was {before.get(name)})" for name in names)
