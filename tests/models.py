"""Tiny random models of every supported architecture, and a tokenizer of words."""

from types import SimpleNamespace

import torch
from torch import nn

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NEOX = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
_MOE = _COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# name: (transformers' configuration class, its options, the key that counts the neurons)
TINY = {
    "llama": ("LlamaConfig", _COMMON, "intermediate_size"),
    "llama_bias": ("LlamaConfig", _COMMON | {"mlp_bias": True}, "intermediate_size"),
    "mistral": ("MistralConfig", _COMMON, "intermediate_size"),
    "qwen2": ("Qwen2Config", _COMMON, "intermediate_size"),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 8}, "intermediate_size"),
    "gemma2": ("Gemma2Config", _COMMON | {"head_dim": 8}, "intermediate_size"),
    "gemma3": ("Gemma3TextConfig", _COMMON | {"head_dim": 8}, "intermediate_size"),
    "phi3": ("Phi3Config", _COMMON, "intermediate_size"),
    "opt": ("OPTConfig", _OPT | _IDS, "ffn_dim"),
    "gpt_neox": ("GPTNeoXConfig", _NEOX, "intermediate_size"),
    "phi": ("PhiConfig", _COMMON, "intermediate_size"),
    "gpt2": ("GPT2Config", _GPT2 | _IDS, "n_inner"),
    "mixtral": ("MixtralConfig", _COMMON | {"num_local_experts": 4}, "intermediate_size"),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _MOE | {"shared_expert_intermediate_size": 64},
        "moe_intermediate_size",
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _MOE | {"head_dim": 8}, "moe_intermediate_size"),
}


def tiny_model(name: str, **options) -> nn.Module:
    """A `random_model` of an architecture, its configuration's defaults overridden."""
    import transformers

    kind, defaults, _ = TINY[name]
    return random_model(getattr(transformers, kind)(**(defaults | options)), std=0.15)


def random_model(config, std: float) -> nn.Module:
    """A random fp32 model in evaluation mode, the same on every call; biases are not zero."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=std)
    return model


class WordTokenizer:
    """Splits at spaces; the word w17 is the token 17 + 3. What prunekit asks of a tokenizer."""

    is_fast = False
    chat_template = None
    pad_token_id = 0
    eos_token_id = 2

    def __call__(self, text, truncation=False, max_length=None, **_):
        ids = [int(word[1:]) + 3 for word in text.split()]
        ids = ids[:max_length] if truncation else ids
        return _Encoding(input_ids=ids)


class _Encoding(SimpleNamespace):
    def __getitem__(self, key):
        return getattr(self, key)


def random_ids(model: nn.Module, batch: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids that every tiny model knows: [batch, length]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 100, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Logits of a model on fixed tokens."""
    return model(input_ids=random_ids(model), use_cache=False).logits
