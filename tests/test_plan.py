"""Plans keep what their strategy says, at the width that rounding says, and refuse the rest."""

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.errors import InputError
from prunekit.plan import PrunePlan, kept_width
from tests.models import tiny_model


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple", "kept"),
    [
        (8960, 0.0571, 128, 8448),  # the paper's widths, 1.5B
        (8960, 0.10, 128, 8064),
        (8960, 0.1571, 128, 7552),
        (8960, 0.3571, 128, 5760),
        (18944, 0.05405, 128, 17920),  # and 7B
        (18944, 0.35135, 128, 12288),
        (1536, 0.2, 64, 1216),
        (1536, 0.5, 64, 768),
        (96, 0.75, 16, 32),  # 24 is as far from 16 as from 32: upward
        (96, 0.99, 64, 64),  # at least one multiple
        (100, 0.01, 64, 100),  # 99 rounds to 128: at most what there is
        (40, 0.5, 64, 40),
        (7, 0.5, 1, 4),
    ],
)
def test_kept_width(width, sparsity, multiple, kept):
    assert kept_width(width, sparsity, multiple) == kept


def test_selective_keeps_the_highest_and_reverse_the_lowest():
    scores = [torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])]
    kept = pk.plan(scores, 0.5, multiple_of=1).kept[0]
    assert kept.tolist() == [2, 4, 5, 7]
    assert kept.dtype == torch.int32
    reverse = pk.plan(scores, 0.5, strategy="reverse", multiple_of=1).kept[0]
    assert reverse.tolist() == [0, 1, 3, 6]


def test_ties_keep_the_lower_index():
    ties = [torch.ones(1000)]
    for strategy in ("selective", "reverse"):
        kept = pk.plan(ties, 0.25, strategy=strategy, multiple_of=1).kept[0]
        assert torch.equal(kept, torch.arange(750, dtype=torch.int32))


def test_random_is_seeded_and_differs_between_layers_and_seeds():
    scores = [torch.zeros(512), torch.zeros(512)]
    plans = {seed: pk.plan(scores, 0.5, strategy="random", seed=seed) for seed in (33, 42)}
    again = pk.plan(scores, 0.5, strategy="random", seed=33)
    assert torch.equal(plans[33].kept[0], again.kept[0])
    assert not torch.equal(plans[33].kept[0], plans[33].kept[1])
    assert not torch.equal(plans[33].kept[0], plans[42].kept[0])


def test_a_plan_survives_the_disk(tmp_path):
    plan = pk.plan([torch.rand(96), torch.rand(48)], 0.5, multiple_of=8, recipe={"why": "test"})
    plan.save(tmp_path / "plan")
    again = PrunePlan.load(tmp_path / "plan")
    assert again.recipe == plan.recipe
    assert again.dense_widths == (96, 48)
    assert all(torch.equal(a, b) for a, b in zip(again.kept, plan.kept, strict=True))
    assert again.widths() == [48, 24]
    assert again.sparsity == 0.5


@pytest.mark.parametrize("bad", [[0, 96], [-1, 3], [4, 4], [5, 2], []])
def test_a_plan_with_impossible_neurons_is_refused(tmp_path, bad):
    PrunePlan((torch.tensor(bad, dtype=torch.int32),), (96,)).save(tmp_path / "plan")
    with pytest.raises(InputError, match=r"must ascend within \[0, 96\)"):
        PrunePlan.load(tmp_path / "plan")


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan")])
def test_sparsity_outside_0_and_1_is_refused(sparsity):
    with pytest.raises(InputError, match="expected a fraction with 0 < sparsity < 1"):
        pk.plan([torch.rand(8)], sparsity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "expected one of selective, reverse, random"),
        ({"allocation": "best"}, "expected one of uniform, budget"),
        ({"multiple_of": 0}, "expected at least 1"),
    ],
)
def test_unknown_options_list_the_valid_ones(options, message):
    with pytest.raises(InputError, match=message):
        pk.plan([torch.rand(8)], 0.5, **options)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="MLP 1 are not all finite"):
        pk.plan([torch.rand(8), torch.tensor([1.0, float("nan")])], 0.5)


def test_a_plan_of_another_model_is_refused(llama):
    wide = find_mlps(tiny_model("llama", intermediate_size=128))
    plan = pk.plan([torch.rand(v.width) for v in wide], 0.5)
    before = [p.clone() for p in llama.parameters()]
    with pytest.raises(InputError, match="made for another model"):
        pk.prune(llama, plan)
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters(), strict=True))


def test_experts_that_would_keep_unequal_widths_are_refused_before_anything_changes():
    model = tiny_model("qwen2_moe")
    widths = [view.width for view in find_mlps(model)]
    kept = [torch.arange(w // 2, dtype=torch.int32) for w in widths]
    kept[-2] = kept[-2][:-1]  # an expert of the last layer
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match="experts of a layer must keep equally many"):
        pk.prune(model, PrunePlan(tuple(kept), tuple(widths)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
