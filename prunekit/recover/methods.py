"""Which weights a recovery trains, and how a model is dressed for it and undressed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from prunekit.arch import find_mlps
from prunekit.backward import training_only
from prunekit.compensate.distill import decoder_matrices
from prunekit.errors import InputError
from prunekit.recover.settings import Settings

_PEFT = "recover: lora needs the package peft; pip install 'prunekit[recover]'"


@contextmanager
def trainable(model: nn.Module, settings: Settings, adapter: Path | None) -> Iterator[nn.Module]:
    """Inside, what a method trains requires gradients, and nothing else does.

    lora puts an adapter beside every linear layer of the decoder (of Llama's kin all seven), in
    fp32, and merges it at the end. full trains every parameter, distill the matrices of the
    decoder's layers; both in fp32, and what comes out has the dtype that went in.

    Args:
        model: in place.
        settings: the method and LoRA's shape.
        adapter: a folder to keep LoRA's adapter in, too; None keeps none.

    Yields:
        What to train: the model, or PEFT's wrapper around it.
    """
    if settings.method == "lora":
        with training_only(model), _adapted(model, settings, adapter) as wrapped:
            yield wrapped
        return
    weights = everything = list(model.parameters())
    if settings.method == "distill":
        weights = decoder_matrices(model, find_mlps(model, verify=False))
    with training_only(model, weights), _in_fp32(everything):
        yield model


@contextmanager
def _in_fp32(weights: list[nn.Parameter]) -> Iterator[None]:
    """Inside, weights are fp32, for steps smaller than what bf16 can add to them."""
    before = [weight.dtype for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.float()
        yield
    finally:
        for weight, dtype in zip(weights, before, strict=True):
            weight.grad = None
            weight.data = weight.data.to(dtype)


@contextmanager
def _adapted(model: nn.Module, settings: Settings, adapter: Path | None) -> Iterator[nn.Module]:
    try:
        import peft
    except ImportError:
        raise InputError(_PEFT) from None
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    wrapped = peft.get_peft_model(model, lora)
    config = wrapped.peft_config["default"]
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # asks no hub
    try:
        yield wrapped
    except BaseException:
        wrapped.unload()
        raise
    if adapter is not None:
        config.base_model_name_or_path = base
        wrapped.save_pretrained(adapter, save_embedding_layers=False)
    wrapped.merge_and_unload()
