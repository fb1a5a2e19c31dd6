"""Sums over 10^9 tokens keep their digits, and threads change no plan."""

import pytest
import torch

import prunekit as pk
from prunekit import ops
from prunekit.ops.gated_act_stats import (
    PROMPT_ABS_SUM,
    PROMPT_SQUARE_SUM,
    TOKEN_ACTIVE,
    TOKEN_MAX_ABS,
    TOKEN_SUM,
)
from prunekit.stats import NeuronSums
from tests.models import tiny_model
from tests.same import assert_same

TOKENS = 10**9
LARGEST = float(torch.finfo(torch.float16).max)


def test_sums_over_a_billion_tokens_keep_their_digits():
    """1000 batches of 1000 prompts of 1000 tokens, in each of which a neuron gives the same h.

    A kernel gives sums over a prompt or a batch in fp32; what is tried is how they are added up.
    """
    h = torch.tensor([LARGEST, 1.0, 1e-3, -3.0], dtype=torch.float64)
    length, prompts, batches = 1000, 1000, 1000
    by_prompt, by_token = torch.empty(2, prompts, 4), torch.empty(3, 4)
    by_prompt[PROMPT_ABS_SUM], by_prompt[PROMPT_SQUARE_SUM] = h.abs() * length, h.square() * length
    by_token[TOKEN_SUM] = h * length * prompts
    by_token[TOKEN_ACTIVE], by_token[TOKEN_MAX_ABS] = (h > 0) * float(length * prompts), h.abs()
    sums = NeuronSums.zeros(4, "cpu")
    for _ in range(batches):
        sums.add(by_prompt, by_token, [length] * prompts)
    assert (sums.prompts, sums.tokens) == (10**6, TOKENS)
    close = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(sums.token_mean, h, **close)
    torch.testing.assert_close(sums.mean_abs, h.abs(), **close)
    torch.testing.assert_close(sums.rms, h.abs(), **close)
    torch.testing.assert_close(sums.prompt_mean, h.abs(), **close)
    torch.testing.assert_close(sums.prompt_norm_sum, 1e6 * h.abs() * length**0.5, **close)
    assert sums.active.tolist() == [TOKENS, TOKENS, TOKENS, 0]  # counts are exact up to 2^53


def test_a_gram_matrix_of_a_billion_tokens_keeps_its_digits():
    """It is fp32: half a million batches round it, hardly where they differ, and at worst by 2^-6.

    The worst is a neuron that gives one and the same sum in every batch, as the last two do: each
    batch is then rounded in the same direction.
    """
    draw = torch.Generator().manual_seed(0)
    kinds = 1024  # batches of 2048 tokens, over and over
    updates, want = [], torch.zeros(64, 64, dtype=torch.float64)
    for _ in range(kinds):
        h = torch.randn(2048, 64, generator=draw) + 0.3
        h[:, -2], h[:, -1] = LARGEST, 1 / 3
        updates.append(torch.zeros(64, 64))
        ops.gram_update(updates[-1], h)
        want += h.double().T @ h.double()
    times = TOKENS // (kinds * 2048)
    gram, want = torch.zeros(64, 64), want * times
    for _ in range(times):
        for update in updates:  # what an update adds, without multiplying it anew
            gram += update
    root = want.diagonal().sqrt()
    assert gram.isfinite().all()
    error = (ops.symmetrize_(gram).double() - want).abs() / torch.outer(root, root)
    assert error[:-2, :-2].max() < 1e-3
    assert error.max() < 2**-6
    before = gram.clone()
    ops.gram_update(gram, h)
    assert (gram.diagonal() > before.diagonal()).all()  # even then one batch more is felt


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_one_plan_and_the_same_number_the_same_bits(
    threads, tokenizer, texts
):
    model = tiny_model("llama", hidden_size=64, intermediate_size=384)
    options = {"gram": True, "gradients": True, "taylor": True, "quiet": True}
    found = []
    for count in (1, 1, 3):
        threads(count)
        found.append(pk.calibrate(model, tokenizer, texts[:6], [texts[20:24]], **options))
    one, again, *others = found
    assert_same(one, again)
    for other in others:
        for name in ("target", "distractor"):
            for a, b in zip(one.classes[name], other.classes[name], strict=True):
                assert (a.prompts, a.tokens) == (b.prompts, b.tokens)
                for key, value in a.tensors().items():
                    error = (value - getattr(b, key)).abs().max()
                    assert error <= 1e-5 * value.abs().max(), key
        for criterion in ("selectivity", "wanda", "taylor", "reconstruction_fisher"):
            plans = [pk.plan(pk.score(s, model, criterion), 0.35).kept for s in (one, other)]
            assert all(map(torch.equal, *plans)), criterion
