"""Token batches: sorted by length, padded on the right, under a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunekit.corpus import Corpus


@dataclass(frozen=True)
class Tokens:
    """One encoded prompt.

    Attributes:
        ids: its tokens.
        scored: the first token that belongs to the completion.
        weight: what each of its tokens counts where errors are weighed (`contrast`).
    """

    ids: tuple[int, ...]
    scored: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Prompts of similar length: ids [B, S], int64, padded on the right.

    ``index`` has each prompt's position among those that were grouped.
    """

    ids: torch.Tensor
    lengths: tuple[int, ...]
    scored: tuple[int, ...]
    index: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    def counted(self) -> torch.Tensor:
        """[B·S], bool: which rows of the flattened batch are tokens and not padding."""
        positions = torch.arange(self.ids.shape[1])
        return (positions < torch.tensor(self.lengths)[:, None]).flatten()

    def spans(self) -> torch.Tensor:
        """[B, 2], int64: where each prompt's tokens lie in the flattened batch."""
        starts = torch.arange(len(self.lengths)) * self.ids.shape[1]
        return torch.stack([starts, starts + torch.tensor(self.lengths)], dim=1)


def encode(corpus: Corpus, tokenizer: Any, max_length: int) -> list[Tokens]:
    """Tokenise a corpus; prompts longer than ``max_length`` tokens are cut."""
    fast = getattr(tokenizer, "is_fast", False)
    encoded = []
    for example in corpus.examples:
        options = {"truncation": True, "max_length": max_length}
        found = tokenizer(example.text, return_offsets_mapping=fast, **options)
        ids = found["input_ids"]
        scored = 0
        if example.completion_start and fast:
            ends = [end for _, end in found["offset_mapping"]]
            scored = next((i for i, e in enumerate(ends) if e > example.completion_start), len(ids))
        elif example.completion_start:
            scored = len(tokenizer(example.text[: example.completion_start], **options).input_ids)
        if ids:
            encoded.append(Tokens(tuple(ids), scored))
    return encoded


def batches(
    prompts: Sequence[Tokens], batch_tokens: int, *, pad: int | None = 0, multiple: int = 1
) -> Iterator[Batch]:
    """Group prompts of similar length, longest first, so that B·S stays within the budget.

    S is a multiple of ``multiple``.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids), reverse=True)
    start = 0
    while start < len(order):
        longest = max(len(prompts[order[start]].ids), 1)
        longest += -longest % multiple
        index = tuple(order[start : start + max(batch_tokens // longest, 1)])
        group = [prompts[i] for i in index]
        ids = torch.full((len(group), longest), pad or 0, dtype=torch.int64)
        for row, prompt in zip(ids, group, strict=True):
            row[: len(prompt.ids)] = torch.tensor(prompt.ids)
        lengths, scored = tuple(len(p.ids) for p in group), tuple(p.scored for p in group)
        yield Batch(ids, lengths, scored, index)
        start += len(group)
