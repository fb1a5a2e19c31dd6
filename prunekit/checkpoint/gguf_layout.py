"""How llama.cpp names and lays out a model: its metadata, its tensors' names, its rotary pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import nn

from prunekit.arch import find_mlps, text_config
from prunekit.errors import InputError

CONVERTER = "llama.cpp's convert_hf_to_gguf.py reads the folder of a checkpoint of one width too"


@dataclass(frozen=True)
class Layout:
    """A llama.cpp architecture.

    Attributes:
        architecture: its name there.
        interleaved: whether its rotary embedding pairs the rows 2i and 2i+1 of a head, where
            transformers pairs i and i + half: the rows of q and k are reordered then.
        biases: the projections that may have one there.
    """

    architecture: str
    interleaved: bool
    biases: tuple[str, ...]


_QKV = ("q_proj", "k_proj", "v_proj")
_EVERY = (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
LAYOUTS = {
    "llama": Layout("llama", True, _EVERY),
    "mistral": Layout("llama", True, _EVERY),
    "qwen2": Layout("qwen2", False, _QKV),
    "qwen3": Layout("qwen3", False, _QKV),
}
# The one architecture whose MLPs may differ in width by layer. It computes as Llama does, biases
# included; Qwen2 is a Llama with biases, once its rows are paired as Llama's are.
DIFFERING = Layout("deci", True, _EVERY)
_AS_LLAMA = ("llama", "mistral", "qwen2")


def layout_of(model: nn.Module) -> Layout:
    """The layout that a model takes in a GGUF file; it may be without weights.

    Raises:
        InputError: llama.cpp has none that computes the same, or prunekit does not know it.
    """
    config = text_config(model)
    kind = config.model_type
    if kind not in LAYOUTS or config is not model.config:
        raise InputError(
            f"GGUF: got a model of type {model.config.model_type}; expected one of "
            f"{', '.join(LAYOUTS)}; {CONVERTER}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(f"GGUF: got the activation {config.hidden_act}; llama.cpp computes silu")
    widths = {view.width for view in find_mlps(model, verify=False)}
    if len(widths) == 1:
        layout = LAYOUTS[kind]
    elif kind in _AS_LLAMA:
        layout = DIFFERING
    else:
        raise InputError(
            f"GGUF: the MLPs of this {kind} differ in width by layer, and llama.cpp's {kind} knows "
            "one width; run `prunekit export --format padded` first, and export what it wrote"
        )
    if layout.architecture == "qwen2" and head_size(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        raise InputError("GGUF: llama.cpp's qwen2 has heads of hidden_size / num_attention_heads")
    return layout


def head_size(config: Any) -> int:
    """The rows of q that one head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_metadata(writer: gguf.GGUFWriter, model: nn.Module) -> None:
    """Write what llama.cpp needs to know of a model beside its tensors.

    Raises:
        InputError: a rotary embedding that llama.cpp does not compute, or not from these keys.
    """
    config = text_config(model)
    widths = [view.width for view in find_mlps(model, verify=False)]
    heads, size = config.num_attention_heads, head_size(config)
    same = len(set(widths)) == 1
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths[0] if same else widths)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _context_length(config: Any) -> int:
    """Tokens over which llama.cpp's attention, which has no window here, is the model's own.

    Its own converter writes the longer context, in which the two differ.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    if window and "sliding_attention" in kinds:
        return min(window, config.max_position_embeddings)
    return config.max_position_embeddings


def rope_of(config: Any) -> dict[str, Any]:
    """A configuration's ``rope_parameters``.

    Raises:
        InputError: llama.cpp computes another, or not from these.
    """
    rope = {"rope_type": "default", **(getattr(config, "rope_parameters", None) or {})}
    rope.setdefault("rope_theta", 10000.0)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise InputError(
            f"GGUF: got a rotary embedding of type {rope['rope_type']}; expected default, linear "
            f"or llama3; {CONVERTER}"
        )
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InputError(f"GGUF: got a rotary embedding of part of a head; {CONVERTER}")
    return rope


def frequency_factors(rope: dict[str, Any], size: int) -> torch.Tensor | None:
    """What a rotary embedding of Llama 3 divides its frequencies by, [size / 2] fp32; else None.

    Args:
        rope: transformers' ``rope_parameters``.
        size: of a head.

    Source:
        ``rope_type`` llama3 of transformers; llama.cpp reads them as ``rope_freqs.weight``.
    """
    if rope["rope_type"] != "llama3":
        return None
    frequency = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def names(model: nn.Module, layout: Layout) -> Iterator[tuple[str, str]]:
    """Each of a model's tensors: its name in transformers, and in the file.

    Raises:
        InputError: a tensor has no place in the file.
    """
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == layout.architecture)
    blocks = text_config(model).num_hidden_layers
    mapping = gguf.get_tensor_name_map(architecture, blocks)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in model.state_dict():
        if name in tied:
            continue
        owner, _, kind = name.rpartition(".")
        renamed = mapping.get_name(owner)
        if renamed is None or (kind == "bias" and owner.split(".")[-1] not in layout.biases):
            raise InputError(
                f"GGUF: {name} has no place in llama.cpp's {layout.architecture}; {CONVERTER}"
            )
        yield name, f"{renamed}.{kind}"


def arranged(name: str, tensor: torch.Tensor, layout: Layout, heads: Sequence[int]) -> torch.Tensor:
    """A tensor with its rows in the order that llama.cpp expects.

    Args:
        name: in transformers.
        tensor: any; of a q or k projection each head's rows are reordered.
        layout: of the file.
        heads: the number of query heads, and of key heads.
    """
    count = _reordered(name, layout, heads)
    if not count:
        return tensor
    halves = tensor.reshape(count, 2, -1, *tensor.shape[1:])  # [head, half, i, ...]
    return halves.transpose(1, 2).reshape(tensor.shape)  # [head, i, half, ...]


def rearranged(
    name: str, tensor: torch.Tensor, layout: Layout, heads: Sequence[int]
) -> torch.Tensor:
    """What `arranged` was given, from what it gave."""
    count = _reordered(name, layout, heads)
    if not count:
        return tensor
    pairs = tensor.reshape(count, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _reordered(name: str, layout: Layout, heads: Sequence[int]) -> int:
    """How many heads' rows are reordered; 0: none."""
    projection = name.split(".")[-2]
    if not layout.interleaved or projection not in ("q_proj", "k_proj"):
        return 0
    return heads[projection == "k_proj"]


def head_counts(model: nn.Module) -> tuple[int, int]:
    """The number of query heads, and of key heads."""
    config = text_config(model)
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads
