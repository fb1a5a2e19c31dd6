"""Budget allocation: exact against brute force, the total of uniform, one line for bad input."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import prunekit as pk
from prunekit.allocation import Sensitivity, budget_widths, cheapest
from prunekit.arch import blocks, find_mlps
from prunekit.errors import InputError
from tests.models import logits, tiny_model


def curves(losses, widths=(16, 32, 48, 64), groups=None, dense=None):
    """A sensitivity with one group a row of losses."""
    groups = groups or tuple((i,) for i in range(len(losses)))
    dense = dense or (widths[-1],) * sum(map(len, groups))
    return Sensitivity(groups, dense, (tuple(widths),) * len(losses), tuple(map(tuple, losses)))


@pytest.mark.parametrize("seed", range(8))
def test_the_cheapest_widths_are_those_of_brute_force(seed):
    random = np.random.default_rng(seed)
    sizes = [1, 1, 3, 2]
    choices = [sorted(random.choice(range(8, 72, 8), 4, replace=False).tolist()) for _ in sizes]
    costs = [random.random(4).tolist() for _ in sizes]  # neither convex nor falling
    picks = list(itertools.product(range(4), repeat=4))
    totals = {sum(s * c[k] for s, c, k in zip(sizes, choices, p, strict=True)) for p in picks}
    for total in sorted(totals):
        possible = [
            sum(cost[k] for cost, k in zip(costs, p, strict=True))
            for p in picks
            if sum(s * c[k] for s, c, k in zip(sizes, choices, p, strict=True)) == total
        ]
        widths = cheapest(choices, costs, sizes, total)
        assert sum(s * w for s, w in zip(sizes, widths, strict=True)) == total
        price = sum(q[c.index(w)] for q, c, w in zip(costs, choices, widths, strict=True))
        assert price == pytest.approx(min(possible))


def test_a_total_that_no_choice_reaches_is_refused():
    with pytest.raises(InputError, match="no choice of widths keeps 24 neurons"):
        cheapest([[8], [8]], [[0.0], [0.0]], [1, 1], 24)


def test_neurons_go_where_they_are_missed_most():
    plain, dear = [4.0, 2.0, 1.0, 0.0], [40.0, 20.0, 10.0, 0.0]
    widths = budget_widths(curves([plain, dear, plain]), [32, 32, 32], 16)
    assert widths == [16, 48, 32] or widths == [32, 48, 16]
    assert budget_widths(curves([plain] * 3), [32, 32, 32], 16) == [32, 32, 32]


def test_a_dearer_mlp_never_keeps_less():
    falling = np.array([4.0, 2.0, 0.8, 0.0])
    kept = []
    for factor in (0.1, 0.5, 1.0, 2.0, 10.0):
        losses = [falling * factor, falling, falling, falling]
        kept.append(budget_widths(curves(losses), [32] * 4, 16)[0])
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_no_mlp_keeps_less_than_half_or_more_than_one_and_a_half_of_its_uniform_share():
    losses = [[0.0] * 8] * 3 + [[7e6, 6e6, 5e6, 4e6, 3e6, 2e6, 1e6, 0.0]]
    widths = budget_widths(curves(losses, range(8, 72, 8)), [32] * 4, 8)
    assert widths[3] == 48
    assert min(widths) >= 16
    assert sum(widths) == 4 * 32


def test_noise_against_falling_and_convex_curves_is_ironed_out():
    found = curves([[3.0, 3.5, 0.5, 0.0]]).at(0, [16, 32, 48, 56, 64])
    assert found.tolist() == [3.0, 1.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("sparsity", [0.2, 0.35, 0.5, 0.8])
def test_a_budget_keeps_as_many_neurons_as_uniform_in_multiples(sparsity):
    generator = torch.Generator().manual_seed(0)
    widths = [96, 100, 100, 64]
    losses = torch.rand(4, 5, generator=generator).sort(descending=True).values.tolist()
    grid = tuple(tuple(round(w * k / 5) for k in range(1, 6)) for w in widths)
    found = Sensitivity(
        tuple((i,) for i in range(4)), tuple(widths), grid, tuple(map(tuple, losses))
    )
    scores = [torch.rand(w, generator=generator) for w in widths]
    uniform = pk.plan(scores, sparsity, multiple_of=16)
    budget = pk.plan(scores, sparsity, allocation="budget", sensitivity=found, multiple_of=16)
    assert sum(budget.widths()) == sum(uniform.widths())
    assert budget.recipe["allocation"] == "budget"
    for width, even, dense in zip(budget.widths(), uniform.widths(), widths, strict=True):
        assert width % 16 == 0 or width in (even, dense)
    for values, kept in zip(scores, budget.kept, strict=True):
        assert values[kept.long()].min() >= values.sort().values[-kept.numel()]


def test_the_experts_of_a_layer_keep_equally_many():
    found = curves([[9.0, 3.0, 1.0, 0.0], [1.0, 0.3, 0.1, 0.0]], groups=((0, 1), (2, 3)))
    assert budget_widths(found, [32] * 4, 16) == [48, 48, 16, 16]


def test_a_sensitivity_survives_the_disk(tmp_path):
    found = curves([[3.0, 1.0, 0.5, 0.0], [2.0, 1.0, 0.25, 0.0]])
    found.save(tmp_path / "s")
    assert Sensitivity.load(tmp_path / "s") == found


@pytest.mark.parametrize(
    ("losses", "groups", "message"),
    [
        ([[1.0, float("nan"), 0.5, 0.0]], None, "group 0: expected ascending widths"),
        ([[1.0, 0.0]], None, "group 0: expected ascending widths"),
        ([[1.0, 0.7, 0.5, 0.0]], ((0, 0),), "must hold each MLP once"),
    ],
)
def test_a_broken_sensitivity_is_refused(tmp_path, losses, groups, message):
    curves(losses, groups=groups).save(tmp_path / "s")
    with pytest.raises(InputError, match=message):
        Sensitivity.load(tmp_path / "s")


def test_budget_asks_for_the_sensitivity_of_this_model():
    scores = [torch.rand(64)] * 3
    with pytest.raises(InputError, match="needs a sensitivity"):
        pk.plan(scores, 0.5, allocation="budget")
    with pytest.raises(InputError, match="measured on 2 MLPs, but the plan has 3"):
        pk.plan(scores, 0.5, allocation="budget", sensitivity=curves([[3.0, 2.0, 1.0, 0.0]] * 2))


def test_the_curve_of_scores_is_the_cost_of_what_had_to_go(llama):
    """At width w the F - w lowest scores are gone, and the highest of them is the cost."""
    scores = torch.rand(find_mlps(llama)[0].width)
    found = pk.sensitivity([scores, scores], llama)
    assert found.widths[0][-1] == 96
    assert found.losses[0][-1] == 0
    for width, loss in zip(found.widths[0][:-1], found.losses[0][:-1], strict=True):
        assert loss == pytest.approx(scores.sort().values[96 - width - 1].item())


def test_a_curve_is_believed_half_way_and_up_to_twice_the_median():
    model = tiny_model("llama", num_hidden_layers=5)
    scores = torch.rand(find_mlps(model)[0].width)
    found = pk.sensitivity([scores * k for k in (0.25, 1, 1, 1.44, 1000)], model)
    curves = np.array(found.losses)[:, :-1]
    for curve, factor in zip(curves, (0.5, 1, 1, 1.2, 2**0.5), strict=True):
        assert curve == pytest.approx(factor * curves[1], rel=1e-5)


def test_experts_of_a_layer_share_a_curve():
    model = tiny_model("mixtral")
    views = find_mlps(model)
    found = pk.sensitivity([torch.rand(v.width) for v in views], model)
    assert len(found.groups) == len(list(blocks(views)))
    plan = pk.plan(
        [torch.rand(v.width) for v in views],
        0.5,
        allocation="budget",
        sensitivity=found,
        multiple_of=8,
    )
    pk.prune(model, plan)  # which refuses experts that keep unequally many
    assert [v.width for v in find_mlps(model)] == plan.widths()


def test_scores_of_another_model_give_no_sensitivity(llama):
    with pytest.raises(InputError, match="one finite score a neuron of this model"):
        pk.sensitivity([torch.rand(8)], llama)


def test_a_budget_of_a_live_model_can_be_pruned_repaired_and_compacted(llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts, gram=True, gradients=True, quiet=True)
    scores = pk.score(stats, llama)
    found = pk.sensitivity(scores, llama)
    wide = (found.losses[0], tuple(100 * loss for loss in found.losses[0]))
    found = dataclasses.replace(found, losses=wide)
    plan = pk.plan(scores, 0.5, allocation="budget", sensitivity=found, multiple_of=8)
    assert plan.widths()[0] < plan.widths()[1]
    pk.prune(llama, plan, stats=stats)
    before = logits(llama)
    assert pk.evaluate(llama, tokenizer, [texts[:5]], quiet=True)["loss"][0]["tokens"]
    pk.compact_modules(llama)
    assert torch.allclose(logits(llama), before, atol=1e-4)
