"""What several verbs share: reading the corpora a config names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit.corpus import Corpus, read_corpus


def corpora(sources: Sequence[str], tokenizer: Any, limit: int) -> list[Corpus]:
    """Read every corpus, each cut to ``limit`` rows (0: all)."""
    return [read_corpus(source, tokenizer, limit=limit or None) for source in sources]


def joined(many: Sequence[Corpus]) -> Corpus:
    """Several corpora as one."""
    if len(many) == 1:
        return many[0]
    examples = tuple(example for corpus in many for example in corpus.examples)
    return Corpus(" + ".join(corpus.name for corpus in many), examples)
