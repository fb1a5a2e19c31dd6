"""Small tokenizers, trained on the spot on this project's own prose."""

from pathlib import Path
from typing import Any

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")
_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
TEXTS = (
    "def f(x):\n    return  12345 + x[0] * 3.5  # it's done",
    "We'll see: MLPs' neurons,   many-many of them!\n\n\t2024 über 100 % — naïve café 你好 😀",
    " begins with a space, ends with one ",
    "<|im_end|> stands whole, <tool> too; THE Quick bROWN",
    "",
    "    1\n  22   333    4444",
)


def _prose() -> list[str]:
    root = Path(__file__).parents[1]
    return [(root / "README.md").read_text(), (root / "prunekit" / "arch.py").read_text(), *TEXTS]


def byte_level(name: str, size: int = 600, **options) -> Any:
    """A byte-level BPE that splits text in one of llama.cpp's ways, as transformers has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from prunekit.checkpoint.gguf_vocab import PRE_TOKENIZERS
    from prunekit.integrations.gguf_tokenizer import pre_tokenizer

    steps, whole_words = PRE_TOKENIZERS[name]
    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizer(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 4,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(_prose(), trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return _wrapped(backend, **options)


def sentencepiece(metaspace: bool = False, **options) -> Any:
    """A BPE over ▁ and characters: bytes are its fallback, every way to make a token is a merge.

    As in Llama's tokenizer.json, which puts ▁ before every text, as SentencePiece and llama.cpp
    do; or, with ``metaspace``, as in transformers' own class, only where there is no space yet.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, limit_alphabet=90, show_progress=False)
    words.train_from_iterator(_prose(), trainer)
    learned = sorted(words.get_vocab(), key=words.get_vocab().get)
    texts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    vocab = {text: id for id, text in enumerate(texts)}
    merges = [
        (text[:i], text[i:])
        for text in learned
        for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return _wrapped(backend, **options)


def _wrapped(backend: Any, *, begins: bool = False) -> Any:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if begins:
        ids = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=ids
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
