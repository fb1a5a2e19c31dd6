"""MLP widths that differ by layer: what a configuration can say of them, and who can load it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import nn

from prunekit.arch import find_mlps, layer_config, text_config
from prunekit.errors import InputError

# By model type the decoder layer that `integrations.layer_widths` builds by its own configuration.
DECODER_LAYERS = {
    "gemma": "GemmaDecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "gemma3_text": "Gemma3DecoderLayer",
    "gpt2": "GPT2Block",
    "gpt_neox": "GPTNeoXLayer",
    "granite": "GraniteDecoderLayer",
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "olmo2": "Olmo2DecoderLayer",
    "opt": "OPTDecoderLayer",
    "phi": "PhiDecoderLayer",
    "phi3": "Phi3DecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "smollm3": "SmolLM3DecoderLayer",
    "stablelm": "StableLmDecoderLayer",
    "starcoder2": "Starcoder2DecoderLayer",
}


def loadable(model: nn.Module) -> bool:
    """Whether a checkpoint of this model may have MLPs of several widths."""
    config = text_config(model)
    return hasattr(type(config), "per_layer_config") and config.model_type in DECODER_LAYERS


def differ(dense_widths: Sequence[int], widths: Sequence[int]) -> bool:
    """Whether MLPs of one dense width keep several."""
    return len(set(zip(dense_widths, widths, strict=True))) > len(set(dense_widths))


def loader(differing: bool) -> str:
    """What loads a checkpoint, in words."""
    plain = "transformers' AutoModelForCausalLM.from_pretrained"
    if not differing:
        return plain
    taught = f"{plain} after `import prunekit.integrations.transformers`"
    return f"prunekit.load, vLLM with prunekit installed, or {taught}"


def check_widths(model: nn.Module) -> None:
    """Raise InputError unless the configuration says every MLP's width, as loading needs."""
    config = text_config(model)
    for view in find_mlps(model, verify=False):
        expected = getattr(layer_config(config, view.layer), view.width_key, None)
        if expected is not None and expected != view.width:
            refuse_differing_widths(
                f"save: {view.name} has {view.width} neurons where {view.width_key} says {expected}"
            )
    if getattr(config, "is_heterogeneous", False) and not loadable(model):
        refuse_differing_widths(f"save: the widths of this {config.model_type} differ by layer")


def refuse_differing_widths(what: str) -> NoReturn:
    """Raise the InputError of every attempt to save widths that nothing could load."""
    raise InputError(
        f"{what}; a checkpoint of this architecture holds MLPs of one width only: take "
        "--allocation uniform, or use the model where it is (prunekit.prune, compact_modules, "
        "evaluate)"
    )
