"""Examples as a model trains on them: token ids, labels on the completions, batches by length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from prunekit.backward import IGNORED
from prunekit.batching import Tokens, encode
from prunekit.corpus import Corpus
from prunekit.errors import InputError

_MIXED = 32  # batches among which examples of similar length share one


def training_tokens(corpus: Corpus, tokenizer: Any, max_length: int) -> list[Tokens]:
    """Encode a corpus, each example closed by the end-of-sequence token unless it was cut.

    Raises:
        InputError: no example has a token to learn within ``max_length``.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    found = []
    for prompt in encode(corpus, tokenizer, max_length):
        ids = prompt.ids
        if end is not None and len(ids) < max_length and end not in ids[-2:]:
            ids = (*ids, end)
        if max(prompt.scored, 1) < len(ids):
            found.append(Tokens(ids, prompt.scored))
    if not found:
        raise InputError(
            f"{corpus.name}: no example has a token to learn within {max_length} tokens; "
            "give longer texts, or a larger max_length"
        )
    return found


class Examples(Dataset):
    """Encoded examples, as a map-style dataset."""

    def __init__(self, prompts: Sequence[Tokens]):
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Tokens:
        return self.prompts[index]


def collate(prompts: Sequence[Tokens]) -> dict[str, torch.Tensor]:
    """Pad examples on the right, where causal attention lets no token see it: [B, S] each.

    S is rounded up to one of 8 lengths an octave: the CPU's library compiles each product of a new
    shape, and keeps it.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    step = max(1 << longest.bit_length() >> 4, 1)
    shape = len(prompts), -(-longest // step) * step
    ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, prompt in enumerate(prompts):
        length, first = len(prompt.ids), max(prompt.scored, 1)
        ids[row, :length] = torch.tensor(prompt.ids)
        labels[row, first:length] = ids[row, first:length]
    return {"input_ids": ids, "labels": labels}


class ByLength(Sampler):
    """Every example once an epoch, those of similar length together; the seed decides all.

    The order of an epoch depends on its number and not on what ran before, so that a resumed run
    sees what an uninterrupted one would.
    """

    def __init__(self, prompts: Sequence[Tokens], batch: int, seed: int):
        self.lengths = [len(prompt.ids) for prompt in prompts]
        self.batch, self.seed, self.epoch = batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        group = _MIXED * self.batch
        for start in range(0, len(order), group):
            mixed = sorted(order[start : start + group], key=self.lengths.__getitem__)
            parts = [mixed[i : i + self.batch] for i in range(0, len(mixed), self.batch)]
            full = [part for part in parts if len(part) == self.batch]
            draw.shuffle(full)  # a part that is not full stays last: the loader cuts by counting
            for part in (*full, *(part for part in parts if len(part) < self.batch)):
                yield from part
