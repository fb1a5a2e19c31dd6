"""llama.cpp computes from our files what transformers computes, and reads the same tokens."""

import ctypes

import llama_cpp
import numpy as np
import pytest
import torch

from prunekit.checkpoint.gguf import save_gguf
from prunekit.checkpoint.gguf_vocab import PRE_TOKENIZERS
from tests.models import tiny_model
from tests.test_gguf import MODELS, made, uneven
from tests.vocabularies import TEXTS, byte_level, sentencepiece

_F32 = 0  # ggml's number of the type


@llama_cpp.llama_log_callback
def _silent(level, text, data):
    pass


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


@pytest.fixture(scope="module")
def words():
    return byte_level("qwen2", 400)


def opened(path, **options):
    """The model in llama.cpp, its cache of keys and values in fp32."""
    shared = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False}
    return llama_cpp.Llama(str(path), type_k=_F32, type_v=_F32, **(shared | options))


def both(model, path):
    """Logits over 48 tokens, [48, vocabulary]: of transformers, and of llama.cpp."""
    ids = torch.randint(4, 390, (48,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].float().numpy()
    engine = opened(path)
    engine.eval(ids)
    return theirs, np.array(engine.scores[: len(ids)])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, words, tmp_path):
    model, _ = made(name, words)
    theirs, ours = both(model, save_gguf(model, words, tmp_path / "m.gguf", "f32"))
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std()


@pytest.mark.parametrize(
    ("outtype", "dtype", "share"),
    [("f16", torch.float16, 0.01), ("bf16", torch.bfloat16, 0.05), ("q8_0", None, 0.05)],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_smaller_types_differ_by_their_rounding(name, outtype, dtype, share, words, tmp_path):
    """llama.cpp rounds what meets a matrix of 16 bits, or of 8, as it multiplies."""
    model, _ = made(name, words)
    path = save_gguf(model, words, tmp_path / "m.gguf", outtype)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
    theirs, ours = both(model, path)
    assert np.abs(ours - theirs).max() <= 5 * share * theirs.std()
    assert np.sqrt(np.square(ours - theirs).mean()) <= share * theirs.std()


@pytest.mark.parametrize("name", ["llama", "biases", "mistral", "qwen2"])
def test_widths_that_differ_compute_the_same(name, words, tmp_path):
    model = uneven(words, name)
    theirs, ours = both(model, save_gguf(model, words, tmp_path / "m.gguf", "f32"))
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std()


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece"])
def test_text_becomes_the_same_tokens(name, begins, tmp_path):
    if name == "sentencepiece":
        tokenizer = sentencepiece(begins=begins)
    else:
        tokenizer = byte_level(name, begins=begins)
    model = tiny_model("llama", vocab_size=len(tokenizer) + 5)
    path = save_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    engine = opened(path, vocab_only=True)
    for text in TEXTS:
        assert engine.tokenize(text.encode(), special=True) == tokenizer(text).input_ids, text
    assert engine.token_eos() == tokenizer.eos_token_id
    assert engine.metadata["tokenizer.chat_template"] == tokenizer.chat_template
