"""Batched greedy generation equals one prompt at a time, and stops where it must."""

from itertools import pairwise

import pytest
import torch

from prunekit.errors import InputError
from prunekit.tasks.generate import cut, end_tokens, generate_batch, new_text
from tests.models import tiny_model


class Letters:
    """A tokenizer of 100 tokens; the token i is written as the pieces say, or as a letter."""

    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __init__(self, pieces=None):
        self.pieces = pieces or {}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.pieces.get(int(i), chr(0x4E00 + int(i))) for i in ids)


def prompts(lengths=(1, 9, 4, 17, 2, 5)):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 100, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def one_by_one(model, prompt, steps):
    """Greedy, without a cache, padding or batches."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return ids[len(prompt) :]


SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {name: {} for name in ("llama", "qwen2", "phi3", "opt", "gpt2", "gpt_neox", "mixtral")}
MODELS |= {"gemma2": SLIDING, "gemma3": SLIDING, "mistral": {"sliding_window": 8}}


def endless(name):
    """A tiny model that has no end token."""
    model = tiny_model(name, **MODELS[name])
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_equals_one_prompt_at_a_time(name):
    model = endless(name)
    given = prompts()
    found = generate_batch(model, Letters(), given, max_new_tokens=12)
    assert found == [(one_by_one(model, prompt, 12), False) for prompt in given]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2"])
def test_rows_that_end_leave_and_the_others_go_on_as_they_were(name):
    model, given = endless(name), prompts()
    free = [one_by_one(model, prompt, 20) for prompt in given]
    ends = sorted({row[i] for i, row in enumerate(free[:-1], 2)})  # ends rows at different times
    model.generation_config.eos_token_id = ends
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = generate_batch(model, Letters(), given, max_new_tokens=20)
    hook.remove()
    for row, (tokens, ended) in zip(free, found, strict=True):
        first = next((i for i, token in enumerate(row) if token in ends), None)
        assert ended == (first is not None)
        assert tokens == row[:first]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    assert sum(sizes) == sum(len(tokens) + ended for tokens, ended in found)


def test_stop_texts_are_found_where_they_straddle_tokens():
    llama = endless("llama")
    given = prompts()
    free = [one_by_one(llama, prompt, 20) for prompt in given]
    a, b = next(pair for row in free for pair in pairwise(row[3:]) if pair[0] != pair[1])
    tokenizer = Letters({a: "x\nST", b: "OPy"})
    found = generate_batch(llama, tokenizer, given, stop=("\nSTOP", "never"), max_new_tokens=20)
    for row, (tokens, ended) in zip(free, found, strict=True):
        whole = tokenizer.decode(row)
        assert ended == ("\nSTOP" in whole)
        if ended:
            assert "\nSTOP" in tokenizer.decode(tokens)
            assert "\nSTOP" not in tokenizer.decode(tokens[:-1])
            assert cut(tokenizer.decode(tokens), ("\nSTOP",)) == (
                whole[: whole.find("\nSTOP")],
                True,
            )
        assert tokens == row[: len(tokens)]
    assert any(ended for _, ended in found)


def test_the_stop_may_begin_far_back_and_in_a_row_of_its_own_length():
    llama = endless("llama")
    given = prompts()
    rows = [one_by_one(llama, prompt, 30) for prompt in given]
    tokenizer = Letters()
    stop = tokenizer.decode(rows[3][10:26])  # 16 tokens long
    tokens, ended = generate_batch(llama, tokenizer, given, stop=(stop,), max_new_tokens=30)[3]
    first = tokenizer.decode(rows[3]).find(stop) + len(stop)
    assert (tokens, ended) == (rows[3][:first], True)


def test_sampling_defaults_of_a_model_do_not_matter():
    llama = endless("llama")
    plain = generate_batch(llama, Letters(), prompts(), max_new_tokens=8)
    llama.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    assert generate_batch(llama, Letters(), prompts(), max_new_tokens=8) == plain


def test_the_models_positions_bound_each_row():
    llama = endless("llama")
    found = generate_batch(llama, Letters(), prompts((60, 10)), max_new_tokens=20)
    assert [len(tokens) for tokens, _ in found] == [4, 20]
    assert [ended for _, ended in found] == [False, False]
    with pytest.raises(InputError, match="got a prompt of 64 tokens, expected fewer than the mod"):
        generate_batch(llama, Letters(), prompts((64, 3)), max_new_tokens=1)


def test_ends_come_from_the_model_and_the_tokenizer(llama):
    tokenizer = Letters()
    tokenizer.eos_token_id = 9
    llama.generation_config.eos_token_id = [4, 5]
    assert end_tokens(llama, tokenizer) == {4, 5, 9}
    llama.generation_config.eos_token_id = None
    assert end_tokens(llama, Letters()) == frozenset()


class Trimming(Letters):
    """Drops a text's leading space, as SentencePiece does."""

    def decode(self, ids, skip_special_tokens=True):
        return super().decode(ids).removeprefix(" ")


def test_the_space_that_a_new_text_begins_with_is_kept():
    assert new_text(Trimming({5: "def f():\n", 6: "    return"}), [5], [6]) == "    return"
    assert new_text(Trimming({5: " a", 6: " b"}), [5, 5], [6, 6]) == " b b"


def test_cut_takes_the_first_stop_of_any():
    assert cut("one\ntwo;three", (";", "\n")) == ("one", True)
    assert cut("one", (";",)) == ("one", False)
    assert cut("", ()) == ("", False)
