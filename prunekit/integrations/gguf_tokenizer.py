"""Loads the tokenizer of a GGUF file.

transformers does too, but splits text as GPT-2 wherever it does not know the way that the file
names, so that numbers after two spaces become other tokens than a SmolLM2 was trained on; and it
gives a tokenizer without ``<|endoftext|>`` that token, with an id for which there is no embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import TokenType

from prunekit.checkpoint.gguf_read import read_gguf
from prunekit.checkpoint.gguf_vocab import ALIASES, PRE_TOKENIZERS, SPECIAL
from prunekit.errors import InputError

_KEY = "tokenizer.ggml."
_BEGIN = ("llama-bpe", "tekken")  # where llama.cpp begins a text with bos unless the file says no


def gguf_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a GGUF file; one that is not byte-level is read by transformers.

    Raises:
        InputError: the file has none, or it is broken.
        ValueError, OSError: from transformers.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path)
    keys = {k.removeprefix(_KEY): v for k, v in read_gguf(path).keys.items() if k.startswith(_KEY)}
    name = ALIASES.get(keys.get("pre"), keys.get("pre"))
    if keys.get("model") != "gpt2" or name not in PRE_TOKENIZERS:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    try:
        special = {
            f"{ours}_token": keys["tokens"][keys[f"{theirs}_token_id"]]
            for ours, theirs in SPECIAL.items()
            if f"{theirs}_token_id" in keys
        }
        backend = _byte_level(keys, name, special)
    except Exception as error:  # of whatever kind tokenizers raises: it knows but one
        raise InputError(f"{path}: its tokenizer is broken: {error}") from None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = read_gguf(path).keys.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(keys: dict[str, Any], name: str, special: dict[str, str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    steps, whole_words = PRE_TOKENIZERS[name]
    tokens = keys["tokens"]
    types = keys.get("token_type", [TokenType.NORMAL] * len(tokens))
    kinds = list(zip(tokens, types, strict=True))
    vocab = {text: id for id, (text, kind) in enumerate(kinds) if kind != TokenType.UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in keys["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizer(steps)
    backend.decoder = decoders.ByteLevel()
    control = [text for text, kind in kinds if kind == TokenType.CONTROL]
    whole = [text for text, kind in kinds if kind == TokenType.USER_DEFINED]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    backend.add_tokens([AddedToken(text, normalized=False) for text in whole])
    before = [special["bos_token"]] if keys.get("add_bos_token", name in _BEGIN) else []
    after = [special["eos_token"]] if keys.get("add_eos_token", False) else []
    if before or after:
        backend.post_processor = _around(before, after, vocab)
    return backend


def _around(before: list[str], after: list[str], vocab: dict[str, int]) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(text, vocab[text]) for text in {*before, *after}],
    )


def pre_tokenizer(steps: tuple[str | bool, ...]) -> Any:
    """What splits text in one of the ways of `PRE_TOKENIZERS`."""
    from tokenizers import Regex, pre_tokenizers

    made = []
    for step in steps:
        if isinstance(step, bool):
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step))
        elif step == "digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            made.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    return pre_tokenizers.Sequence(made)
