"""The loss is the mean negative log likelihood of the completion's tokens, batched or not."""

import math

import pytest
import torch

import prunekit as pk
from prunekit.corpus import Corpus, Example
from prunekit.errors import InputError
from prunekit.evaluate import evaluate_loss, generate_samples
from tests.models import tiny_model


@pytest.fixture
def corpus(texts):
    """Texts whose second half is the completion."""
    cut = [" ".join(t.split()[: len(t.split()) // 2]) for t in texts]
    return Corpus("c", tuple(Example(t, len(c)) for t, c in zip(texts, cut, strict=True)))


@torch.no_grad()
def by_hand(model, tokenizer, corpus):
    totals, count = 0.0, 0
    for example in corpus.examples:
        ids = torch.tensor(tokenizer(example.text).input_ids)
        start = len(tokenizer(example.text[: example.completion_start]).input_ids)
        logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for t in range(max(start, 1), len(ids)):
            totals -= logits[t - 1, ids[t]].item()
            count += 1
    return totals / count, count


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_the_loss_equals_the_one_by_hand(name, batch_tokens, tokenizer, corpus):
    model = tiny_model(name)
    found = evaluate_loss(model, tokenizer, corpus, batch_tokens=batch_tokens, quiet=True)
    loss, count = by_hand(model, tokenizer, corpus)
    assert found.tokens == count
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert 0 < found.stderr < found.loss


def test_stderr_shrinks_with_the_number_of_prompts(llama, tokenizer, corpus):
    few = evaluate_loss(llama, tokenizer, corpus, quiet=True)
    many = evaluate_loss(llama, tokenizer, Corpus("c", corpus.examples * 4), quiet=True)
    assert many.loss == pytest.approx(few.loss, rel=1e-6)
    assert many.stderr == pytest.approx(few.stderr / 2, rel=1e-3)


def test_nothing_to_score_and_nan_are_refused(llama, tokenizer):
    with pytest.raises(InputError, match="no token to score"):
        evaluate_loss(llama, tokenizer, ["w1"], quiet=True)
    with torch.no_grad():
        llama.model.norm.weight[0] = math.nan
    with pytest.raises(InputError, match="the loss is NaN"):
        evaluate_loss(llama, tokenizer, ["w1 w2 w3"], quiet=True)


def test_evaluate_gives_a_row_a_corpus_and_samples(demo_model):
    model, tokenizer = demo_model
    corpora = [Corpus(n, (Example("The capital of France is Paris.", 24),)) for n in "ab"]
    result = pk.evaluate(model, tokenizer, corpora, samples=1, quiet=True)
    assert [row["corpus"] for row in result["loss"]] == ["a", "b"]
    assert result["loss"][0]["loss"] < 2.0  # a chance guess among 49152 tokens costs 10.8
    again = generate_samples(model, tokenizer, corpora[0], count=1)
    assert result["samples"] == again
    assert again[0]["completion"].strip().startswith("Paris")


def test_samples_are_what_transformers_generates_greedily(folder):
    from prunekit.integrations.loading import load_tokenizer

    model, words = pk.load(folder), load_tokenizer(str(folder))
    rows = [(" ".join(f"w{i}" for i in range(a, b)), 5) for a, b in ((3, 9), (40, 44), (7, 80))]
    corpus = Corpus("c", tuple(Example(text, start) for text, start in rows))

    def generated(ids):
        row = torch.tensor([ids])
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        out = model.generate(row, attention_mask=torch.ones_like(row), **options)
        return words.decode(out[0, len(ids) :], skip_special_tokens=True).split()

    samples = generate_samples(model, words, corpus, count=3, new_tokens=12)
    for (text, start), sample in zip(rows, samples, strict=True):
        assert sample["prompt"] == text[:start]
        assert sample["completion"].split() == generated(words(text[:start]).input_ids) != []
    whole = Corpus("c", (Example(rows[2][0], 0),))  # 73 words, of 64 positions
    (cut,) = generate_samples(model, words, whole, new_tokens=12)
    assert cut["completion"].split() == generated(words(rows[2][0]).input_ids[-52:])
    model.train()
    assert generate_samples(model, words, corpus, count=1, new_tokens=12) == samples[:1]
    assert model.training
