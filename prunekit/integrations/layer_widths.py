"""Decoder layers built each from its own configuration, for MLPs that differ in width by layer."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from torch import nn

from prunekit.checkpoint.widths import DECODER_LAYERS


def install(model_types: Iterable[str] = tuple(DECODER_LAYERS)) -> None:
    """Have transformers build these models' decoder layers from ``config.per_layer_config``.

    Models whose layers are all alike are built as before. Nothing happens twice.

    Args:
        model_types: as configurations name them; those that transformers lacks are left out.
    """
    from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

    for model_type in model_types:
        name = DECODER_LAYERS[model_type]
        family = model_type.removesuffix("_text")
        try:
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ImportError:  # this transformers is older than the model
            continue
        if name not in get_patch_mapping():
            register_patch_mapping({name: _built_by_layer(getattr(module, name))})


def _built_by_layer(original: type[nn.Module]) -> type[nn.Module]:
    """A class of decoder layers that differs from the original in which configuration it reads."""

    class Layer(original):
        def __init__(self, config: Any, layer_idx: int, *args: Any, **options: Any):
            own = config.per_layer_config[layer_idx] if config.is_heterogeneous else config
            super().__init__(own, layer_idx, *args, **options)
            if own is config:
                return
            # What is switched on the model's configuration later, such as the attention's
            # implementation, must reach the layers too.
            for module in self.modules():
                if getattr(module, "config", None) is own:
                    module.config = config

    # By its name transformers keeps a layer whole on one device.
    Layer.__name__, Layer.__qualname__ = original.__name__, original.__qualname__
    Layer.__module__, Layer.__doc__ = original.__module__, original.__doc__
    return Layer
