"""Tiny random models of every family, of a size that vLLM's attention on the CPU takes, pruned."""

import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.plan import PrunePlan
from tests.models import random_model

WIDTH = 384
_HEADS = {"hidden_size": 128, "num_attention_heads": 4}
_COMMON = {
    **_HEADS,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
_OWN = {  # what they call their sizes, or have not
    "gpt2": {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 128},
    "gpt_neox": {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")},
    "opt": _HEADS | {"ffn_dim": WIDTH, "num_hidden_layers": 2, "word_embed_proj_dim": 128},
}
_TOKENS = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def dense(model_type="llama"):
    """A random fp32 model of two layers, the same on every call; biases are not zero."""
    from transformers import AutoConfig

    sizes = _OWN.get(model_type, _COMMON)
    return random_model(AutoConfig.for_model(model_type, **sizes, **_TOKENS), std=0.08)


def pruned(model_type, thirds):
    """One whose layers keep so many thirds of their neurons, the odd ones first."""
    model = dense(model_type)
    widths = tuple(view.width for view in find_mlps(model))
    kept = tuple(
        torch.cat([torch.arange(1, width, 2), torch.arange(0, width, 2)])[: width * part // 3]
        for width, part in zip(widths, thirds, strict=True)
    )
    return pk.prune(model, PrunePlan(tuple(k.sort().values.int() for k in kept), widths))


def uneven(model_type="llama"):
    """One whose layers keep a third and two thirds of their neurons."""
    return pruned(model_type, (1, 2))


def even(model_type="llama"):
    """One whose layers keep two thirds of their neurons each."""
    return pruned(model_type, (2, 2))
