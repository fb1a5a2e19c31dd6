"""Loads GGUF files of the architectures that prunekit writes; transformers loads the others.

transformers reads these too, but drops a llama's biases and its rotary scaling without a word,
knows one size of a qwen3's heads, and takes ten times as long.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.gguf_layout import (
    DIFFERING,
    LAYOUTS,
    frequency_factors,
    head_counts,
    names,
    rearranged,
)
from prunekit.checkpoint.gguf_read import GGUF, read_gguf
from prunekit.checkpoint.gguf_vocab import SPECIAL
from prunekit.errors import InputError
from prunekit.integrations.layer_widths import install

_ROPE_FACTORS = "rope_freqs.weight"
_TYPES = {"llama": "llama", "deci": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def reads(path: str | Path) -> bool:
    """Whether this module loads a GGUF file.

    Raises:
        InputError: it is none, or cut short.
    """
    return read_gguf(path).architecture in _TYPES


def gguf_dtype(path: str | Path) -> torch.dtype:
    """The dtype that most of a file's values have; bf16 for quantised ones."""
    kinds = {"f16": torch.float16, "f32": torch.float32}
    return kinds.get(next(iter(read_gguf(path).types), ""), torch.bfloat16)


def gguf_config(path: str | Path) -> Any:
    """The transformers configuration of a GGUF file that `reads` says yes to.

    Raises:
        InputError: it is broken, or of a kind that transformers has no model for.
    """
    from transformers import AutoConfig

    file = read_gguf(path)
    try:
        config = AutoConfig.for_model(_TYPES[file.architecture], **_config(file))
    except InputError:
        raise
    except Exception as error:  # of whatever kind transformers raises for what a key may hold
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"{path}: its keys make no model: {reason}") from None
    config._name_or_path = str(path)
    if len(set(file.widths)) > 1:
        config.per_layer_config = {
            i: {"intermediate_size": width} for i, width in enumerate(file.widths)
        }
        install([config.model_type])
    return config


def _config(file: GGUF) -> dict[str, Any]:
    heads = file.get("attention.head_count")
    if not isinstance(heads, int) or not all(file.widths):
        raise InputError(
            f"{file.path}: its layers differ in more than their MLPs' widths, and transformers has "
            "no such model"
        )
    hidden = file.get("embedding_length")
    size = file.get("attention.key_length", file.get("rope.dimension_count", hidden // heads))
    said = {
        "hidden_size": hidden,
        "intermediate_size": max(file.widths),
        "num_hidden_layers": file.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": file.get("context_length"),
        "rms_norm_eps": file.get("attention.layer_norm_rms_epsilon"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, size),
    }
    for ours, theirs in SPECIAL.items():
        said[f"{ours}_token_id"] = file.keys.get(f"tokenizer.ggml.{theirs}_token_id")
    if file.architecture == "qwen2":
        del said["head_dim"]  # it has none of its own
    if _TYPES[file.architecture] == "llama":
        said["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        said["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    return said


def _rope(file: GGUF, size: int) -> dict[str, Any]:
    base = file.get("rope.freq_base", 10000.0)
    kind = file.get("rope.scaling.type", "none")
    if kind == "linear":
        factor = file.get("rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": base, "factor": factor}
    if kind != "none":
        raise InputError(f"{file.path}: got a rotary embedding scaled by {kind}; expected linear")
    if _ROPE_FACTORS not in file.tensors:
        return {"rope_type": "default", "rope_theta": base}
    return {"rope_theta": base} | llama3_scaling(file.read(_ROPE_FACTORS), base, str(file.path))


def llama3_scaling(factors: torch.Tensor, base: float, what: str) -> dict[str, Any]:
    """The parameters of Llama 3's rotary scaling from what it divides the frequencies by.

    Between its two ends 1/factor is a line over the frequency. It has one parameter more than a
    line: the lower of the two ends, which is 1 in every Llama, is taken to be 1 here.

    Args:
        factors: ``rope_freqs.weight``, [head / 2] fp32.
        base: the rotary embedding's.
        what: names the file in errors.

    Raises:
        InputError: they are not Llama 3's.
    """
    values = factors.double()
    if bool((values == 1).all()):
        return {"rope_type": "default"}
    half = values.numel()
    turn = base ** (-torch.arange(half, dtype=torch.float64) / half) / (2 * math.pi)
    largest = values.max().item()
    inside = (values > 1 + 1e-6) & (values < largest * (1 - 1e-6))
    if inside.sum() >= 2:
        share = (1 / values[inside] - 1 / largest) / (1 - 1 / largest)
        x = turn[inside]
        slope = ((x - x.mean()) * (share - share.mean())).sum() / ((x - x.mean()) ** 2).sum()
        spread = (-1 / (share.mean() - slope * x.mean())).item()  # high - low, where low is 1
        found = {
            "rope_type": "llama3",
            "factor": round(largest, 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": round(1 + spread, 3),
            "original_max_position_embeddings": round(slope.item() * spread),
        }
        again = frequency_factors(found | {"rope_theta": base}, 2 * half)
        if again is not None and torch.allclose(again, factors, rtol=1e-4):
            return found
    raise InputError(f"{what}: its {_ROPE_FACTORS} is none that Llama 3's rotary scaling makes")


def load_gguf(path: str | Path, dtype: torch.dtype) -> Any:
    """Load a model from a GGUF file that `reads` says yes to, on the CPU.

    Raises:
        InputError: a tensor is missing, is not of the shape that the keys say, or has no place.

    Cost:
        The file read once; the model, and one tensor in fp32.
    """
    from transformers import AutoModelForCausalLM

    file, config = read_gguf(path), gguf_config(path)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = _state(file, shape, dtype)
    return type(shape).from_pretrained(None, state_dict=state, config=config, dtype=dtype)


def _state(file: GGUF, shape: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    layout = DIFFERING if file.architecture == "deci" else LAYOUTS[file.architecture]
    expected = {name: tuple(tensor.shape) for name, tensor in shape.state_dict().items()}
    state, unused = {}, set(file.tensors) - {_ROPE_FACTORS}
    for name, theirs in names(shape, layout):
        if theirs not in file.tensors:
            if not theirs.endswith(".bias"):
                raise InputError(f"{file.path}: has no tensor {theirs}")
            state[name] = torch.zeros(expected[name], dtype=dtype)
            continue
        if file.tensors[theirs].shape != expected[name]:
            raise InputError(
                f"{file.path}: {theirs} is {list(file.tensors[theirs].shape)}, but the keys say "
                f"{list(expected[name])}"
            )
        unused.discard(theirs)
        state[name] = rearranged(name, file.read(theirs).to(dtype), layout, head_counts(shape))
    if unused:
        raise InputError(
            f"{file.path}: {min(unused)} has no place in transformers' {shape.config.model_type}"
        )
    return state
