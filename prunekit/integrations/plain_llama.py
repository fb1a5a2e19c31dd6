"""What a model's timings are held against: a Llama of its shape in plain transformers.

It does the same test, so that a neighbour who takes memory, caches or the clock slows both alike,
and no change of ours touches it. Of plain matrix products that is not so: on a shared host MLPs of
one token differed from them by 10 % for half a minute and more, and from such MLPs by 3 %.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import torch
from torch import nn

from prunekit.arch import find_mlps, text_config
from prunekit.errors import InputError

_BYTES = 1 << 30  # of weights at most, unless one layer has more
_VOCABULARY = 1 << 16  # at most


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. A baseline keeps them, whatever becomes of the model afterwards."""

    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """The sizes of a causal language model whose MLPs prunekit knows; the middle of its widths.

        Raises:
            InputError: it has none.
        """
        config, views = text_config(model), find_mlps(model, verify=False)
        heads, hidden = config.num_attention_heads, views[0].down.shape[0]
        return cls(
            hidden,
            int(median(view.width for view in views)),
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or hidden // heads,
            config.vocab_size,
        )

    @classmethod
    def read(cls, facts: Any) -> Shape:
        """From what a baseline keeps.

        Raises:
            InputError: it is not that.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(facts, dict) or facts.keys() != names:
            raise InputError("the baseline does not say what it was held against; save it anew")
        if not all(type(size) is int and size > 0 for size in facts.values()):
            raise InputError(f"the baseline was held against no model: {facts}; save it anew")
        return cls(**facts)

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Such a Llama, of random weights: fewer layers and words where it would be large.

        Args:
            dtype: of its weights on a GPU; on a CPU, which may only emulate others, fp32.

        Cost:
            At most 1 GB of weights, or one layer and 65536 words.
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        dtype = torch.float32 if device.type == "cpu" else dtype
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        layer = self.hidden * (3 * self.width + attention) * dtype.itemsize
        words = min(self.vocabulary, _VOCABULARY)
        left = _BYTES - words * self.hidden * dtype.itemsize
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=max(1, min(self.layers, left // layer)),
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim + self.head_dim % 2,  # halves are rotated
            vocab_size=words,
            tie_word_embeddings=True,
            dtype=dtype,
        )
        with torch.random.fork_rng(devices=[]):
            return LlamaForCausalLM(config).to(device, dtype).eval()
