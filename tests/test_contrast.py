"""The knob between target and distractor weighs what it says, in scores and in repairs."""

import copy
from dataclasses import replace

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.batching import Tokens
from prunekit.compensate.importance import token_weights
from prunekit.contrast import against, weigh
from prunekit.criteria.auto import resolved
from prunekit.errors import InputError
from tests.models import tiny_model


@pytest.fixture
def tasks(texts):
    """Two corpora of one model that share no word."""
    words = [text.split() for text in texts]
    target = [" ".join(w for w in row if int(w[1:]) < 45) for row in words]
    distractor = [" ".join(w for w in row if int(w[1:]) >= 45) for row in words]
    return [t for t in target if t], [t for t in distractor if t]


@pytest.fixture
def stats(llama, tokenizer, tasks):
    return whole(llama, tokenizer, *tasks)


def whole(model, tokenizer, target, distractor):
    options = {"gram": True, "gradients": True, "off_task": True, "quiet": True}
    return pk.calibrate(model, tokenizer, target, [distractor], **options)


def test_second_moments_are_weighed_by_the_knob_alone(stats):
    for knob in (0.1, 1.0):
        mixed = weigh(stats, knob)
        for got, t, d in zip(mixed.target, stats.target, stats.classes["distractor"], strict=True):
            want = (t.second_moment() + knob * d.second_moment()) / (1 + knob)
            torch.testing.assert_close(got.second_moment(), want, rtol=1e-5, atol=1e-9)
            want = (t.rms.square() + knob * d.rms.square()) / (1 + knob)
            torch.testing.assert_close(got.rms.square(), want)
            metric = t.gradient_gram / t.tokens + knob * d.gradient_gram / d.tokens
            got_metric = got.gradient_gram / got.tokens * (1 + knob)
            torch.testing.assert_close(got_metric, metric, rtol=1e-4, atol=1e-7)


def test_of_a_longer_distractor_a_token_weighs_less(llama, tokenizer, tasks, stats):
    target, distractor = tasks
    longer = weigh(whole(llama, tokenizer, target, distractor * 3), 0.5)
    for a, b in zip(weigh(stats, 0.5).target, longer.target, strict=True):
        torch.testing.assert_close(a.second_moment(), b.second_moment(), rtol=1e-4, atol=1e-8)
    weights = sorted({p.weight for p in longer.prompts})
    tokens = [sum(len(t.split()) for t in texts) for texts in (target, distractor * 3)]
    assert weights == pytest.approx(sorted([1.0, 0.5 * tokens[0] / tokens[1]]))


def test_equal_weights_are_one_calibration_of_both(llama, tokenizer, tasks):
    target, distractor = tasks[0], tasks[0][::-1]  # as many tokens
    mixed = weigh(whole(llama, tokenizer, target, distractor), 1.0)
    both = pk.calibrate(llama, tokenizer, target + distractor, gram=True, quiet=True)
    for a, b in zip(mixed.target, both.target, strict=True):
        assert (a.prompts, a.tokens) == (b.prompts, b.tokens)
        torch.testing.assert_close(a.prompt_sum, b.prompt_sum)
        scale = b.gram.diagonal().sqrt()  # terms of many times a sum may cancel in it
        torch.testing.assert_close(
            a.gram / scale / scale[:, None], b.gram / scale / scale[:, None], rtol=0, atol=4e-6
        )
    assert mixed.prompts == both.prompts


@pytest.mark.parametrize("method", ["lstsq", "sequential"])
def test_the_knob_trades_the_targets_loss_for_the_distractors(
    method, llama, tokenizer, tasks, stats
):
    """Of the change of the logits on what was calibrated on, both ends of the knob."""

    @torch.no_grad()
    def errors(knob):
        weighed, pruned = weigh(stats, knob), copy.deepcopy(llama)
        plan = pk.plan(pk.score(weighed, llama), 0.4, multiple_of=8)
        pk.prune(pruned, plan, stats=weighed, compensate=method)
        found = []
        for texts in tasks:
            ids = [torch.tensor([tokenizer(text).input_ids]) for text in texts]
            changes = [pruned(input_ids=i).logits - llama(input_ids=i).logits for i in ids]
            found.append(sum(c.square().sum().item() for c in changes))
        return found

    spent, kept = errors(0.0), errors(1.0)
    assert spent[0] < 0.97 * kept[0]
    assert kept[1] < 0.8 * spent[1]


def test_two_calibrations_are_one_of_both_tasks(llama, tokenizer, tasks, stats):
    alone = [
        pk.calibrate(llama, tokenizer, texts, gram=True, gradients=True, quiet=True)
        for texts in tasks
    ]
    both = against(*alone)
    assert both.hash == stats.hash
    assert weigh(both, 0.5).hash == weigh(stats, 0.5).hash
    assert (both.prompts, both.distractor_prompts) == (stats.prompts, stats.distractor_prompts)
    other = pk.calibrate(tiny_model("qwen2"), tokenizer, tasks[1], quiet=True)
    other.fingerprint = "another"
    with pytest.raises(InputError, match="taken on two different models"):
        against(alone[0], other)


def test_gradients_that_only_the_target_has_are_left_out(llama, tokenizer, tasks):
    """The default criterion, which weighs errors by them, then gives way to wanda."""
    target = pk.calibrate(llama, tokenizer, tasks[0], gram=True, gradients=True, quiet=True)
    mixed = weigh(against(target, pk.calibrate(llama, tokenizer, tasks[1], gram=True)), 0.5)
    assert mixed.target[0].gradient_gram is None
    assert resolved("auto", mixed, repaired=True) == "wanda"
    assert resolved("auto", target, repaired=True) == "reconstruction_fisher"


def test_without_the_knob_nothing_changes(stats):
    assert weigh(stats, 0.0) is stats


@pytest.mark.parametrize("gathered", [True, False])
def test_a_prompts_weight_multiplies_its_tokens_importance(llama, stats, gathered):
    mixed = weigh(stats, 0.25)
    if not gathered:
        mixed = replace(mixed, gradient_squares=None)
    plain = replace(mixed, prompts=[Tokens(p.ids, p.scored) for p in mixed.prompts])
    views = find_mlps(llama)
    own = torch.tensor([p.weight for p in mixed.prompts for _ in p.ids])
    assert own.unique().numel() == 2
    pairs = zip(token_weights(llama, views, mixed), token_weights(llama, views, plain), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs * own)


def test_an_expert_that_the_distractor_prefers_keeps_its_preference(tokenizer, tasks):
    model = tiny_model("mixtral")
    stats = whole(model, tokenizer, *tasks)
    mixed = weigh(stats, 1.0)
    total = [sum(s.tokens for s in many) for many in stats.classes.values()]
    for got, t, d in zip(mixed.target, stats.target, stats.classes["distractor"], strict=True):
        assert got.tokens == pytest.approx(t.tokens + d.tokens * total[0] / total[1])


def test_both_classes_prompts_survive_the_disk(stats, tmp_path):
    stats.save(tmp_path / "stats")
    loaded = pk.NeuronStats.load(tmp_path / "stats")
    assert loaded.prompts == stats.prompts
    assert loaded.distractor_prompts == stats.distractor_prompts
    for name in ("gradient_squares", "distractor_squares"):
        for mine, theirs in zip(getattr(loaded, name), getattr(stats, name), strict=True):
            assert torch.equal(mine, theirs)
    assert weigh(loaded, 0.5).hash == weigh(stats, 0.5).hash != stats.hash


def test_what_is_missing_is_named(llama, tokenizer, tasks):
    target, distractor = tasks
    alone = pk.calibrate(llama, tokenizer, target, quiet=True)
    with pytest.raises(InputError, match="no distractor statistics; calibrate with --distractor"):
        weigh(alone, 0.5)
    half = pk.calibrate(llama, tokenizer, target, [distractor], gram=True, quiet=True)
    with pytest.raises(InputError, match="hold no gram; calibrate with --off-task"):
        weigh(half, 0.5)
    with pytest.raises(InputError, match=r"got 1\.5; expected a weight from 0 to 1"):
        weigh(half, 1.5)
    both = whole(llama, tokenizer, target, distractor)
    with pytest.raises(InputError, match="needs distractor statistics"):
        pk.score(weigh(both, 0.5), llama, "selectivity")
