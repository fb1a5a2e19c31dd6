"""Criteria equal their formulas, and say what they lack."""

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.criteria import CRITERIA, criterion
from prunekit.errors import InputError
from tests.models import tiny_model


@pytest.fixture
def stats(llama, tokenizer, texts):
    return pk.calibrate(llama, tokenizer, texts[:30], [texts[30:]], quiet=True)


def test_wanda_is_rms_times_the_norm_of_the_down_column(llama, stats):
    scores = pk.score(stats, llama, "wanda")
    for view, sums, found in zip(find_mlps(llama), stats.target, scores, strict=True):
        rms = (sums.token_square_sum / sums.tokens).sqrt()
        expected = rms * view.down.detach().double().square().sum(0).sqrt()
        torch.testing.assert_close(found, expected.float())


def test_mean_abs_is_the_mean_over_tokens(llama, stats):
    scores = pk.score(stats, llama, "mean_abs")
    for sums, found in zip(stats.target, scores, strict=True):
        torch.testing.assert_close(found, (sums.token_abs_sum / sums.tokens).float())


def test_random_differs_by_seed_and_needs_no_statistics(llama):
    first, again, other = (pk.score(None, llama, "random", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_every_criterion_gives_a_finite_fp32_score_a_neuron(llama, stats):
    for name in CRITERIA:
        for view, found in zip(find_mlps(llama), pk.score(stats, llama, name), strict=True):
            assert found.dtype == torch.float32
            assert found.shape == (view.width,)
            assert torch.isfinite(found).all()
            assert found.unique().numel() > view.width // 2


def test_an_unknown_criterion_lists_those_there_are(llama, stats):
    with pytest.raises(InputError, match="expected one of mean_abs, random, selectivity, wanda"):
        pk.score(stats, llama, "best")


def test_selectivity_without_distractors_says_so(llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts[:5], quiet=True)
    with pytest.raises(InputError, match="needs distractor statistics"):
        pk.score(stats, llama, "selectivity")


def test_statistics_of_another_model_are_refused(stats):
    with pytest.raises(InputError, match="taken on another model"):
        pk.score(stats, tiny_model("llama", intermediate_size=64), "wanda")


def test_one_can_register_ones_own_and_nan_is_refused(llama, stats):
    @criterion("broken", needs=())
    def broken(evidence):
        return torch.full((evidence.view.width,), float("nan"))

    try:
        with pytest.raises(InputError, match=r"criterion broken: .* scores that are not finite"):
            pk.score(stats, llama, "broken")
    finally:
        del CRITERIA["broken"]
