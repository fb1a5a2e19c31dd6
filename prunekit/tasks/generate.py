"""Greedy generation in batches: padded on the left, each row leaving as soon as it ends."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prunekit.arch import cache_keyword
from prunekit.errors import InputError

# Tokens of the prompt that are decoded with the new ones: some tokenizers trim a text's start.
_CONTEXT = 4


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The ids that end a generation, by the model's generation config and the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def new_text(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of new tokens as it goes on from the prompt's, without special tokens."""
    context = list(prompt[-_CONTEXT:])
    before = tokenizer.decode(context, skip_special_tokens=True)
    whole = tokenizer.decode([*context, *tokens], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there was one."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class _Stops:
    """Tells, token by token, when a stop text stands at the end of what was generated."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        # A token holds a byte at least; the margin is for tokens cut off in the middle of a letter.
        self.window = max((len(word.encode()) for word in stop), default=0) + 8

    def reached(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        if not self.stop:
            return False
        first = max(len(tokens) - self.window, 0)
        before = tokens[:first] if first else prompt
        return cut(new_text(self.tokenizer, before, tokens[first:]), self.stop)[1]


def _pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, S] and their mask, both int64."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _limits(model: nn.Module, prompts: Sequence[Sequence[int]], wanted: int) -> list[int]:
    """How many tokens each row may get: as many as wanted, and as the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    room = [wanted if positions is None else positions - len(prompt) for prompt in prompts]
    if min(room) < 1:
        longest = max(map(len, prompts))
        raise InputError(
            f"generate: got a prompt of {longest} tokens, expected fewer than the model's "
            f"{positions} positions; leave it out"
        )
    return [min(wanted, left) for left in room]


@torch.inference_mode()
def generate_batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    max_new_tokens: int,
) -> list[tuple[list[int], bool]]:
    """Continue prompts with the likeliest token each time, whatever the model's sampling defaults.

    Args:
        model: a causal language model in evaluation mode; it must be able to keep a cache.
        tokenizer: its tokenizer.
        prompts: token ids, none empty.
        stop: texts that end a row, wherever the tokens' borders lie.
        max_new_tokens: limit of new tokens a row.

    Returns:
        For each prompt its new tokens, and whether it ended by itself: by a stop text, whose tokens
        are among them, or by an end token, which is not.

    Raises:
        InputError: a prompt leaves no position for a new token.

    Cost:
        One prefill of B·S tokens, then one forward of the rows that have not ended a step.
    """
    ends, stops = end_tokens(model, tokenizer), _Stops(tokenizer, stop)
    limits = _limits(model, prompts, max_new_tokens)
    ids, mask = _pad_left(prompts, tokenizer.pad_token_id or 0)
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    accepted = inspect.signature(model.forward).parameters
    past = cache_keyword(model)
    options = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})
    found: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    live = list(range(len(prompts)))
    while True:
        if "position_ids" in accepted:
            options["position_ids"] = positions
        out = model(input_ids=ids, attention_mask=mask, **options)
        options[past], ids = out[past], out.logits[:, -1].argmax(-1, keepdim=True)
        keep = []
        for place, (row, token) in enumerate(zip(live, ids[:, 0].tolist(), strict=True)):
            if token in ends:
                ended[row] = True
                continue
            found[row].append(token)
            ended[row] = stops.reached(prompts[row], found[row])
            if not ended[row] and len(found[row]) < limits[row]:
                keep.append(place)
        if not keep:
            return list(zip(found, ended, strict=True))
        if len(keep) < len(live):
            live = [live[place] for place in keep]
            index = torch.tensor(keep, device=ids.device)
            options[past].batch_select_indices(index)
            ids, mask, positions = ids[index], mask[index], positions[index]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        positions = positions[:, -1:] + 1
