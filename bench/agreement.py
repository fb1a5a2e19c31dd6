"""Whether another engine continues prompts greedily as transformers does, token by token."""

from __future__ import annotations

import torch
from torch import nn

NEAR_TIE = 0.25  # nats; bf16 holds logits of 16 to 32, as these models have, to 0.0625 either way


def greedy(model: nn.Module, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers puts greedily after each prompt, one prompt at a time."""
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


@torch.no_grad()
def shortfalls(model: nn.Module, prompt: list[int], continuation: list[int]) -> list[float]:
    """How much less likely each token of a continuation is than the likeliest one, in nats.

    Each is judged after the tokens that the continuation itself has before it, so that one near-tie
    that fell the other way says nothing of what follows.

    Args:
        model: of transformers; in fp32 it says what is likelier before any rounding to bf16.
        prompt: the token ids that were continued.
        continuation: the token ids that the other engine put after them.

    Returns:
        A number a token, 0 where it is the likeliest.

    Cost:
        One forward over both.
    """
    ids = torch.tensor([prompt + continuation], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    taken = logits.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return (logits.max(-1).values - taken).tolist()
