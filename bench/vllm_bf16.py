"""What vLLM's bf16 does to a model on this CPU, computed by transformers.

vLLM's kernels for CPUs without AVX512-BF16 cut bf16 off where they should round it: every number
that a norm, an activation or a residual sum leaves is too small, by half a unit on average. With
it they round to the nearest, as torch does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType

import torch
from torch import nn

from bench.agreement import NEAR_TIE, greedy, shortfalls

Round = Callable[[torch.Tensor], torch.Tensor]
_FACTOR = 2.0  # sums in another order may double what rounding does


def nearest(x: torch.Tensor) -> torch.Tensor:
    """fp32 values rounded to bf16."""
    return x.bfloat16().float()


def cut_off(x: torch.Tensor) -> torch.Tensor:
    """fp32 values without the bits that bf16 has not."""
    return (x.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32)


def vllm_rounds() -> Round:
    """How vLLM's kernels leave bf16 on this CPU."""
    return nearest if torch.cpu._is_avx512_bf16_supported() else cut_off


def computing_as(model: nn.Module, leave: Round) -> nn.Module:
    """A copy whose norms, activations and residual sums are left in bf16 by ``leave``.

    Args:
        model: of the Llama layout (Llama, Mistral, Qwen2), in fp32; products are rounded to bf16.
    """

    def norm(self, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return leave(x * scale * self.weight)

    def mlp(self, x):
        h = self.act_fn(nearest(self.gate_proj(x))) * nearest(self.up_proj(x))
        return nearest(self.down_proj(leave(h)))

    def layer(self, hidden_states, **others):
        attended, *_ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)
        x = leave(hidden_states + nearest(attended))
        return leave(x + self.mlp(self.post_attention_layernorm(x)))

    model = copy.deepcopy(model)
    for module in model.modules():
        for ending, forward in (("RMSNorm", norm), ("MLP", mlp), ("DecoderLayer", layer)):
            if type(module).__name__.endswith(ending):
                module.forward = MethodType(forward, module)
    return model


def explained(model: nn.Module, prompts: list[list[int]], tokens: int) -> float:
    """How far below the likeliest, in nats, vLLM's tokens in bf16 may fall on this CPU.

    Twice what transformers' do after the same prompts with that arithmetic; a near-tie at least.

    Args:
        model: of transformers, in fp32.
        prompts: token ids.
        tokens: continued after each.

    Cost:
        Two generations and a forward a prompt.
    """
    found = greedy(computing_as(model, vllm_rounds()), prompts, tokens)
    worst = max(max(shortfalls(model, p, c)) for p, c in zip(prompts, found, strict=True))
    return max(NEAR_TIE, _FACTOR * worst)
