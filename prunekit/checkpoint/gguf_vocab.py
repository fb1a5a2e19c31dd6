"""A tokenizer as llama.cpp reads it: tokens, merges or scores, special tokens, chat template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import gguf

from prunekit.checkpoint.gguf_layout import CONVERTER
from prunekit.errors import InputError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_LLAMA3 = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_LETTERS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is split before merging, and whether a word that is a token needs no merges; by the name
# that llama.cpp has for it. True: the regular expression that ByteLevel brings itself.
PRE_TOKENIZERS: dict[str, tuple[tuple[str | bool, ...], bool]] = {
    "gpt-2": ((True,), False),
    "smollm": (("digits", True), False),
    "qwen2": ((_QWEN2, False), False),
    "llama-bpe": ((_LLAMA3, False), True),
    "smaug-bpe": ((_LLAMA3, False), False),
    "tekken": ((_TEKKEN, False), True),
}
# Other names for the same.
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "starcoder": "smollm",
    "refact": "smollm",
    "deepseek-r1-qwen": "qwen2",
}
# What transformers calls a special token, and what a GGUF file does.
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: gpt2 (byte-level BPE) or llama (SentencePiece's BPE, bytes as its fallback).
        pre: llama.cpp's name for how text is split before merging.
        tokens: every id's text; ids that the tokenizer lacks have a name of their own.
        types: every id's kind.
        merges: of gpt2, best first.
        scores: of llama, by which neighbours are merged, highest first.
        facts: the remaining keys, such as ``bos_token_id`` and ``add_bos_token``.
        chat_template: as Jinja, or several by name.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str] | None = None
    scores: list[float] | None = None
    facts: dict[str, int | bool] = field(default_factory=dict)
    chat_template: str | list[dict[str, str]] | None = None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Give it to a writer."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        for key, value in self.facts.items():
            getattr(writer, f"add_{key}")(value)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        tokenizer: a fast one of transformers.
        size: of the embedding; ids that the tokenizer lacks are filled up.

    Raises:
        InputError: llama.cpp has no tokenizer that does the same, or prunekit does not know it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise InputError(
            f"GGUF: got a {type(tokenizer).__name__}; expected a tokenizer with a tokenizer.json; "
            f"{CONVERTER}"
        )
    said = json.loads(backend.to_str())
    kind = said["model"].get("type")
    if kind != "BPE":
        raise InputError(f"GGUF: got a tokenizer of type {kind}; expected BPE; {CONVERTER}")
    pieces = {id: text for text, id in said["model"]["vocab"].items()}
    added = {token["id"]: token for token in said["added_tokens"]}
    if (last := max([*pieces, *added])) >= size:
        raise InputError(f"GGUF: the tokenizer has the id {last}, the embedding {size} rows")
    sentencepiece = bool(said["model"].get("byte_fallback"))
    found = _sentencepiece(said, pieces, size) if sentencepiece else _byte_level(said)
    for id in range(size):
        text, kind = _token(id, pieces, added, sentencepiece, said["model"].get("unk_token"))
        found.tokens.append(text)
        found.types.append(kind)
    if len(set(found.tokens)) < size:
        raise InputError(f"GGUF: two ids of the tokenizer have one text; {CONVERTER}")
    found.facts |= _special(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    found.chat_template = template
    return found


def _token(
    id: int, pieces: dict, added: dict, sentencepiece: bool, unknown: str | None
) -> tuple[str, gguf.TokenType]:
    if id in added:
        text = added[id]["content"]
        if sentencepiece and text == unknown:
            return text, gguf.TokenType.UNKNOWN
        if added[id]["special"] or _LOOKS_SPECIAL.fullmatch(text):
            return text, gguf.TokenType.CONTROL
        text = text.replace("▁", " ") if sentencepiece else text
        return text, gguf.TokenType.USER_DEFINED
    if pieces.get(id, unused := f"[PAD{id}]") == unused:
        return unused, gguf.TokenType.UNUSED
    if sentencepiece and _BYTE.fullmatch(pieces[id]):
        return pieces[id], gguf.TokenType.BYTE
    if sentencepiece and pieces[id] == unknown:
        return pieces[id], gguf.TokenType.UNKNOWN
    return pieces[id], gguf.TokenType.NORMAL


def _pairs(said: dict) -> list[tuple[str, str]]:
    return [tuple(m.split(" ") if isinstance(m, str) else m) for m in said["model"]["merges"]]


def _steps(part: dict | None) -> list[dict]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [
        step
        for inner in part.get("pretokenizers", part.get("normalizers"))
        for step in _steps(inner)
    ]


def _split(step: dict) -> str | bool | None:
    """A step as `PRE_TOKENIZERS` writes it; None: as none of them."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return step.get("use_regex", True)
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return step["pattern"].get("Regex")
    return None


def _byte_level(said: dict) -> Vocabulary:
    steps = tuple(_split(step) for step in _steps(said["pre_tokenizer"]))
    whole_words = bool(said["model"].get("ignore_merges"))
    known = [name for name, way in PRE_TOKENIZERS.items() if way == (steps, whole_words)]
    # llama.cpp composes no characters; nor does its converter, for the models that are made to.
    strange = [s["type"] for s in _steps(said["normalizer"]) if s["type"] != "NFC"]
    if not known or strange:
        what = f"the normalizer {strange[0]}" if strange else "a way of splitting text"
        raise InputError(
            f"GGUF: the tokenizer has {what} that is none of {', '.join(PRE_TOKENIZERS)}; "
            f"{CONVERTER}"
        )
    merges = [" ".join(pair) for pair in _pairs(said)]
    return Vocabulary("gpt2", known[0], [], [], merges=merges)


def _sentencepiece(said: dict, pieces: dict[int, str], size: int) -> Vocabulary:
    """Scores from the order of merges, where every way to put a token together is a merge."""
    pairs = _pairs(said)
    order = {text: -float(i) for i, text in enumerate(dict.fromkeys(a + b for a, b in pairs))}
    known = set(pieces.values())
    ways = {
        (text[:i], text[i:])
        for text in order
        for i in range(1, len(text))
        if text[:i] in known and text[i:] in known
    }
    if ways != set(pairs):
        raise InputError(
            "GGUF: the tokenizer's merges are not SentencePiece's, and llama.cpp knows no other "
            f"with bytes as their fallback; {CONVERTER}"
        )
    lowest = -float(len(order))
    scores = [order.get(pieces.get(id, ""), lowest) for id in range(size)]
    found = Vocabulary("llama", "default", [], [], scores=scores)
    found.facts["add_space_prefix"] = _prefixed(said)
    return found


def _prefixed(said: dict) -> bool:
    """Whether text begins with a space that it does not have."""
    for step in [*_steps(said["normalizer"]), *_steps(said["pre_tokenizer"])]:
        if step["type"] == "Prepend":
            return True
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _special(tokenizer: Any) -> dict[str, int | bool]:
    """The ids of special tokens, and which of them begin and end every text."""
    facts: dict[str, int | bool] = {}
    for name in SPECIAL:
        id = getattr(tokenizer, f"{name}_token_id", None)
        if id is not None:
            facts[f"{name}_token_id"] = id
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    bos, eos = [facts.get("bos_token_id")], [facts.get("eos_token_id")]
    for before in ([], bos):
        for after in ([], eos):
            if before + bare + after == full:
                return facts | {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    raise InputError(
        "GGUF: the tokenizer puts more around a text than its first and its last token; "
        f"{CONVERTER}"
    )
