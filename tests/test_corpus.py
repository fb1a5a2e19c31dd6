"""Corpora are read as documented, and every broken one gives a line that says where."""

import json

import pytest

from prunekit.batching import Tokens, batches, encode
from prunekit.corpus import Corpus, Example, as_corpus, from_texts, read_corpus
from prunekit.errors import InputError
from tests.models import WordTokenizer


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_columns(tmp_path):
    rows = {"text": "a b"}, {"prompt": "a ", "completion": "b"}, {"prompt": "only"}
    corpus = read_corpus(write(tmp_path / "c.jsonl", *rows))
    assert corpus.examples == (Example("a b"), Example("a b", 2), Example("only"))
    assert read_corpus(tmp_path / "c.jsonl", limit=2).examples == corpus.examples[:2]


def test_csv_with_quotes_and_newlines(tmp_path):
    (tmp_path / "c.csv").write_text('id,prompt,completion\n1,"a, ""b""\nc ",d\n2,e,\n')
    corpus = read_corpus(tmp_path / "c.csv")
    assert corpus.examples == (Example('a, "b"\nc d', 9), Example("e"))


class _Chat(WordTokenizer):
    chat_template = "there is one"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + "<assistant>" * add_generation_prompt


def test_messages_go_through_the_chat_template(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write(tmp_path / "c.jsonl", {"messages": chat})
    example = read_corpus(path, _Chat()).examples[0]
    assert example.text[example.completion_start :] == "yo</>"
    with pytest.raises(InputError, match="need a tokenizer with a chat template"):
        read_corpus(path, WordTokenizer())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"c\.jsonl:2: is not JSON"),
        ('{"text": "a"}\n\n[1]\n', r"c\.jsonl:3: expected an object, got list"),
        ('{"question": "a"}\n', r"c\.jsonl:1: no usable column; have question; expected `text`"),
        ('{"prompt": "a", "completion": 5}\n', r"c\.jsonl:1: completion must be a string"),
        ("", r"c\.jsonl: the corpus is empty"),
        ('{"text": ""}\n', r"c\.jsonl: the corpus is empty"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, content, message):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_corpus(tmp_path / "c.jsonl")


def test_what_is_no_text_file_is_refused(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_corpus(tmp_path / "c.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read_corpus(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        read_corpus(tmp_path)


def test_the_hash_tells_corpora_apart():
    one, two = from_texts(["a", "b"]), from_texts(["ab"])
    assert one.hash == from_texts(["a", "b"], "other name").hash
    assert one.hash != two.hash
    assert as_corpus(one) is one
    assert as_corpus(["a", "b"]).examples == one.examples


def test_batches_keep_to_the_budget_and_lose_nothing():
    prompts = [Tokens(tuple(range(1, n + 1))) for n in (3, 9, 1, 4, 4, 30, 2)]
    found = list(batches(prompts, 12))
    assert all(b.ids.numel() <= 12 or len(b.lengths) == 1 for b in found)
    rows = [tuple(row[:n].tolist()) for b in found for row, n in zip(b.ids, b.lengths, strict=True)]
    assert sorted(rows) == sorted(p.ids for p in prompts)
    for b in found:
        for row, n, (start, end) in zip(b.ids, b.lengths, b.spans().tolist(), strict=True):
            assert (row[n:] == 0).all()
            assert b.ids.flatten()[start:end].tolist() == row[:n].tolist()


def test_lengths_are_rounded_up_within_the_budget():
    prompts = [Tokens(tuple(range(1, n + 1))) for n in (3, 9, 1, 4, 4, 30, 2)]
    found = list(batches(prompts, 32, multiple=8))
    assert all(b.ids.shape[1] % 8 == 0 and b.ids.numel() <= 32 for b in found)
    assert sorted(n for b in found for n in b.lengths) == sorted(len(p.ids) for p in prompts)


def test_encoding_finds_the_first_token_of_the_completion():
    corpus = Corpus("c", (Example("w1 w2 w3 w4", 6), Example("w5 w6")))
    assert encode(corpus, WordTokenizer(), 3) == [Tokens((4, 5, 6), 2), Tokens((8, 9), 0)]


def test_a_fast_tokenizers_offsets_find_the_completion(demo_model):
    _, tokenizer = demo_model
    prompt, completion = "def add(a, b):", "\n    return a + b\n"
    corpus = Corpus("c", (Example(prompt + completion, len(prompt)),))
    tokens = encode(corpus, tokenizer, 99)[0]
    assert tokenizer.decode(tokens.ids[tokens.scored :]) == completion
