"""Criteria equal their formulas, and say what they lack."""

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.criteria import CRITERIA, criterion
from prunekit.errors import InputError
from tests.models import tiny_model
from tests.test_stats import h_of_each_prompt


@pytest.fixture
def stats(llama, tokenizer, texts):
    options = {"gram": True, "gradients": True, "quiet": True}
    return pk.calibrate(llama, tokenizer, texts[:30], [texts[30:]], **options)


# name: the formula over h (one [tokens, F] a prompt), all tokens t [T, F], and the weights, in fp64
FORMULAS = {
    "mean_abs": lambda h, t, gate, up, down: t.abs().mean(0),
    "rms": lambda h, t, gate, up, down: t.square().mean(0).sqrt(),
    "wanda": lambda h, t, gate, up, down: t.square().mean(0).sqrt() * down.square().sum(0).sqrt(),
    "wanda_sp": lambda h, t, gate, up, down: (down.abs() * t.square().sum(0).sqrt()).mean(0),
    "minitron": lambda h, t, gate, up, down: torch.stack([p.abs().mean(0) for p in h]).norm(dim=0),
    "fluctuation": lambda h, t, gate, up, down: t.var(0, correction=0) * down.square().sum(0),
    "two_stage": lambda h, t, gate, up, down: torch.stack([p.norm(dim=0) for p in h]).mean(0),
    "puzzletron_independent": lambda h, t, gate, up, down: (
        down.norm(dim=0) * sum(p.abs().mean(0) for p in h)
    ),
    "magnitude_ppm": lambda h, t, gate, up, down: sum(
        torch.tensor([max(row) + abs(min(row)) for row in matrix.tolist()], dtype=torch.float64)
        for matrix in (gate, up)
        if matrix is not None
    ),
    "magnitude_l2": lambda h, t, gate, up, down: torch.cat(
        [matrix for matrix in (gate, up, down.T) if matrix is not None], dim=1
    ).norm(dim=1),
}


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])
def test_criteria_equal_their_formulas_over_stored_activations(name, tokenizer, texts):
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts, batch_tokens=100, quiet=True)
    prompts = h_of_each_prompt(model, tokenizer, texts)
    views = find_mlps(model)
    for criterion_name, formula in FORMULAS.items():
        for i, found in enumerate(pk.score(stats, model, criterion_name)):
            h = [mlps[i] for mlps in prompts]
            matrices = (views[i].gate, views[i].up, views[i].down)
            weights = [m if m is None else m.detach().double() for m in matrices]
            expected = formula(h, torch.cat(h), *weights)
            error = (found.double() - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, (criterion_name, i)


def test_every_criterion_is_tested():
    elsewhere = {"random", "selectivity", "taylor"}
    assert set(CRITERIA) == set(FORMULAS) | elsewhere


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
    with pytest.raises(InputError, match=r"expected one of fluctuation, .*, wanda, wanda_sp"):
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
