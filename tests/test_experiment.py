"""What experiments conclude from their measurements."""

import copy
import math

import pytest
import torch

import prunekit as pk
from prunekit.contrast import weigh
from prunekit.corpus import from_texts
from prunekit.errors import InputError
from prunekit.evaluate import evaluate_loss
from prunekit.experiment.knee import bounded, knee, shown
from prunekit.experiment.off_task import off_task_spent
from prunekit.experiment.variants import Variant, run_variants
from tests.models import tiny_model

LIMIT = math.log(1.05)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.2, 2 * LIMIT)], 0.1),  # from the dense model, which lost nothing
        ([(0.4, 3 * LIMIT), (0.2, 0.5 * LIMIT)], 0.24),  # 0.5 to 3: a fifth of the way
        ([(0.2, 0.0), (0.3, LIMIT), (0.4, 9.0)], 0.3),
        ([(0.1, -0.01), (0.2, LIMIT / 2)], 0.2),
        ([(0.1, 2 * LIMIT), (0.2, 0.0), (0.3, 2 * LIMIT)], 0.05),  # the first crossing counts
    ],
    ids=["dense to one", "between two", "on the limit", "never reached", "not monotone"],
)
def test_the_knee_is_where_the_loss_first_rises_by_5_percent_in_perplexity(points, expected):
    assert knee(points) == pytest.approx(expected)
    assert knee(points[::-1]) == knee(points)


def test_a_knee_beyond_what_was_measured_is_a_lower_bound():
    assert not bounded([(0.2, 0.9 * LIMIT)])
    assert shown([(0.2, 0.9 * LIMIT)]) == "≥ 20.0 %"
    assert shown([(0.2, 2 * LIMIT)]) == "10.0 %"
    assert knee([(0.2, 0.1)], perplexity_rise=math.exp(0.2) - 1) == 0.2


@pytest.mark.parametrize("points", [[], [(0.0, 0.1)], [(0.2, float("nan"))]])
def test_no_knee_comes_of_nothing(points):
    with pytest.raises(InputError, match="expected sparsities within"):
        knee(points)


@pytest.mark.parametrize("name", ["llama", "llama_bias", "opt", "gpt2"])
@pytest.mark.parametrize("method", ["none", "bias", "lstsq", "sequential", "distill"])
def test_variants_share_the_dense_models_weights_and_change_none(name, method, tokenizer, texts):
    """Bit for bit what pruning a whole copy gives; only distillation needs one."""
    model, held_out = tiny_model(name), from_texts(texts[40:])
    stats = pk.calibrate(model, tokenizer, texts[:40], gram=True, quiet=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    options = {"compensate": method, "steps": 2 if method == "distill" else None}
    ways = [Variant("w", s, "wanda", **options) for s in (0.3, 0.6)]
    found = run_variants(model, tokenizer, stats, held_out, ways, multiple_of=8, quiet=True)
    for outcome in list(found):
        plan = pk.plan(pk.score(stats, model, "wanda"), outcome.variant.sparsity, multiple_of=8)
        expected = pk.prune(copy.deepcopy(model), plan, stats=stats, **options)
        mine, theirs = outcome.model.state_dict(), expected.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert outcome.loss == evaluate_loss(expected, tokenizer, held_out, quiet=True)
        shared = [key for key in mine if mine[key].data_ptr() in pointers(before, model)]
        assert bool(shared) == (method != "distill")
        assert not any(".mlp." in key or "fc1" in key for key in shared)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.config.to_dict() == config


def pointers(names, model):
    state = model.state_dict()
    return {state[key].data_ptr() for key in names}


def test_a_variant_keeps_its_share_off_task_and_what_was_spent_is_told(llama, tokenizer, texts):
    target, other, held_out = texts[:20], texts[20:40], from_texts(texts[40:])
    options = {"gram": True, "gradients": True, "off_task": True, "quiet": True}
    stats = pk.calibrate(llama, tokenizer, target, [other], **options)
    ways = [Variant("w", 0.4, "wanda", compensate="lstsq", keep_off_task=k) for k in (0, 0.7, 0)]
    outcomes = list(
        run_variants(llama, tokenizer, stats, held_out, ways, multiple_of=8, quiet=True)
    )
    for outcome in outcomes:
        weighed, expected = weigh(stats, outcome.variant.keep_off_task), copy.deepcopy(llama)
        plan = pk.plan(pk.score(weighed, llama, "wanda"), 0.4, multiple_of=8)
        pk.prune(expected, plan, stats=weighed, compensate="lstsq")
        for a, b in zip(outcome.model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)
    dense = evaluate_loss(llama, tokenizer, held_out, quiet=True)
    elsewhere = from_texts(texts[:9])
    spent = list(off_task_spent(llama, dense, tokenizer, elsewhere, outcomes))
    assert [s.keep_off_task for s in spent] == [0, 0.7, 0]
    assert spent[0] == spent[2] != spent[1]
    before, after = (
        evaluate_loss(m, tokenizer, elsewhere, quiet=True).loss for m in (llama, outcomes[1].model)
    )
    assert (spent[1].target, spent[1].off_task) == (
        outcomes[1].loss.loss - dense.loss,
        after - before,
    )
