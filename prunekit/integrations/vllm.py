"""vLLM's plugin, found through its entry point: MLPs may differ in width by layer there too.

vLLM builds every decoder layer from the model's configuration, which has no one width in such a
checkpoint. The layers' constructors are wrapped where they stand, as in `layer_widths`, so that
each gets the configuration of its own layer. Classes of ours would have to follow every change of
vLLM's; the transformers backend would do as well, but only for those who ask for it, and it leaves
vLLM's own layers unused. Models that vLLM has no layers for run through that backend anyway, and
any model does with ``model_impl="transformers"``: there transformers' layers are wrapped.

vLLM calls `register` in each of its processes, most of which build no model, so nothing of a model
is imported before vLLM itself loads its class. Models whose layers are all alike are built as
before. Tried with vLLM 0.32.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_MODELS = "vllm.model_executor.models"
_BACKEND = f"{_MODELS}.transformers"
_DONE = "_built_by_layer"

# By architecture the module and the name of vLLM's decoder layer.
DECODER_LAYERS = {
    "GPT2LMHeadModel": ("gpt2", "GPT2Block"),
    "Gemma2ForCausalLM": ("gemma2", "Gemma2DecoderLayer"),
    "Gemma3ForCausalLM": ("gemma3", "Gemma3DecoderLayer"),
    "GemmaForCausalLM": ("gemma", "GemmaDecoderLayer"),
    "GraniteForCausalLM": ("granite", "GraniteDecoderLayer"),
    "LlamaForCausalLM": ("llama", "LlamaDecoderLayer"),
    "MistralForCausalLM": ("mistral", "MistralDecoderLayer"),
    "OPTForCausalLM": ("opt", "OPTDecoderLayer"),
    "Phi3ForCausalLM": ("llama", "LlamaDecoderLayer"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2DecoderLayer"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3DecoderLayer"),
    "StableLmForCausalLM": ("stablelm", "StablelmDecoderLayer"),
}
# Those that vLLM runs through its transformers backend, and what it calls all others there.
BACKED = (
    "GPTNeoXForCausalLM",
    "Olmo2ForCausalLM",
    "PhiForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
    "TransformersForCausalLM",
)


def register() -> None:
    """Have vLLM build these models' decoder layers from ``config.per_layer_config``.

    Nothing happens twice. Architectures that this vLLM lacks are left out.

    Cost:
        No import but of vLLM's registry.
    """
    from vllm import ModelRegistry

    models = getattr(ModelRegistry, "models", {})
    for architecture in (*DECODER_LAYERS, *BACKED):
        registered = models.get(architecture)
        if registered is None or isinstance(registered.load_model_cls, functools.partial):
            continue
        load = functools.partial(_load, registered.load_model_cls, architecture)
        object.__setattr__(registered, "load_model_cls", load)  # it is a frozen dataclass


def _load(load: Callable[[], type], architecture: str) -> type:
    """vLLM's own class, whose layers from now on are built by layer."""
    model = load()
    try:
        _teach(model, architecture)
    except (AttributeError, ImportError) as error:  # of another vLLM: that is no reason to fail
        logger.warning("%s loads with MLPs of one width only: %s", architecture, error)
    return model


def _teach(model: type, architecture: str) -> None:
    if model.__module__.startswith(_BACKEND):
        from prunekit.integrations.layer_widths import install

        install()
    elif architecture in DECODER_LAYERS:
        module, name = DECODER_LAYERS[architecture]
        layer = getattr(importlib.import_module(f"{_MODELS}.{module}"), name)
        if not hasattr(layer.__init__, _DONE):
            layer.__init__ = _by_layer(layer.__init__)


def _by_layer(construct: Callable) -> Callable:
    from vllm.model_executor.models.utils import extract_layer_index

    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def init(*args: Any, **named: Any) -> None:
        call = signature.bind(*args, **named)
        given = call.arguments
        config = given.get("config")
        if config is None and "vllm_config" in given:  # Llama's kin
            config = given["vllm_config"].model_config.hf_config
        if getattr(config, "is_heterogeneous", False):
            given["config"] = config.per_layer_config[extract_layer_index(given["prefix"])]
        construct(*call.args, **call.kwargs)

    setattr(init, _DONE, True)
    return init
