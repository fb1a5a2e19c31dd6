"""Gradients equal plain autograd in fp64, over every architecture, and leave no trace."""

import copy

import pytest
import torch
import torch.nn.functional as F

import prunekit as pk
from prunekit import backward
from prunekit.arch import find_mlps
from prunekit.batching import Tokens, batches
from prunekit.errors import InputError
from prunekit.gradients import add_gradients, output_gradients
from prunekit.stats import NeuronStats, NeuronSums
from tests.models import tiny_model


def in_fp64(model):
    """A copy in fp64, whose experts are computed one by one (transformers' grouped ones cannot)."""
    wide = copy.deepcopy(model).double()
    wide.config._experts_implementation = "eager"
    return wide


def loss_of(model, ids):
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")


def taylor_by_autograd(model, prompts):
    """[mlps] of [F], in fp64: gradients of the views' own parameters, read through the slots."""
    scores = [torch.zeros(v.width, dtype=torch.float64) for v in find_mlps(model)]
    for ids in prompts:
        model.zero_grad()
        loss_of(model, ids).backward()
        gradients = copy.deepcopy(model)
        with torch.no_grad():
            for mine, theirs in zip(gradients.parameters(), model.parameters(), strict=True):
                mine.copy_(0 if theirs.grad is None else theirs.grad)
        views, changes = find_mlps(model), find_mlps(gradients, verify=False)
        for score, view, change in zip(scores, views, changes, strict=True):
            score += (view.gate * change.gate).detach().abs().sum(1)
            score += (view.down * change.down).detach().abs().sum(0)
            if view.up is not None:
                score += (view.up * change.up).detach().abs().sum(1)
    model.zero_grad()
    return scores


def test_taylor_equals_autograd_prompt_by_prompt(architecture, tokenizer, texts):
    model = tiny_model(architecture)
    few = ["w5", *texts[:4]]
    stats = pk.calibrate(model, tokenizer, few, taylor=True, quiet=True)
    prompts = [ids for text in few if len(ids := tokenizer(text).input_ids) > 1]
    expected = taylor_by_autograd(in_fp64(model), prompts)
    for found, want in zip(pk.score(stats, model, "taylor"), expected, strict=True):
        assert (found.double() - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", ["llama_bias", "opt", "gpt2", "phi3"])
def test_the_output_gradients_gram_equals_autograd(name, tokenizer, texts):
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts[:6], gradients=True, quiet=True)
    wide = in_fp64(model)
    grams = [0.0] * len(stats.names)
    outputs = []
    for view in find_mlps(wide):
        view.down_owner.register_forward_hook(lambda _, args, out: outputs.append(out))
    for text in texts[:6]:
        outputs.clear()
        ids = tokenizer(text).input_ids
        for i, g in enumerate(torch.autograd.grad(loss_of(wide, ids), outputs)):
            g = g.reshape(-1, g.shape[-1])
            grams[i] = grams[i] + g.T @ g
    for sums, want in zip(stats.target, grams, strict=True):
        assert (sums.gradient_gram.double() - want).abs().max() < 1e-4 * want.abs().max()


def test_an_experts_gram_is_of_the_gradients_of_its_own_output(tokenizer, texts):
    """Each expert run by itself: its output is a tensor of its own, before the router's weight."""
    model = tiny_model("mixtral")
    stats = pk.calibrate(model, tokenizer, texts[:6], gradients=True, quiet=True)
    wide = in_fp64(model)
    views = find_mlps(wide)
    outputs = {}

    def experts_forward(indices):
        def forward(x, chosen, weights):
            y = torch.zeros_like(x)
            for i in indices:
                h = views[i].apply(x)
                outputs[i] = h
                share = (weights * (chosen == views[i].expert)).sum(1, keepdim=True)
                y = y + h * share
            return y

        return forward

    for layer in (0, 1):
        indices = [i for i, v in enumerate(views) if v.layer == layer]
        views[indices[0]].module.forward = experts_forward(indices)
    grams = [0.0] * len(views)
    for text in texts[:6]:
        loss = loss_of(wide, tokenizer(text).input_ids)
        found = torch.autograd.grad(loss, [outputs[i] for i in range(len(views))])
        for i, g in enumerate(found):
            grams[i] = grams[i] + g.T @ g
    for sums, want in zip(stats.target, grams, strict=True):
        assert (sums.gradient_gram.double() - want).abs().max() < 1e-4 * want.abs().max()
        assert torch.equal(sums.gradient_gram, sums.gradient_gram.T)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30], ids=["checkpointed", "kept"])
def test_the_activations_are_counted_on_the_way_as_without_gradients(
    architecture, kept_bytes, tokenizer, texts, monkeypatch
):
    monkeypatch.setattr(backward, "KEPT_BYTES", kept_bytes)
    model, few = tiny_model(architecture), ["w5", *texts[:6]]
    alone = pk.calibrate(model, tokenizer, few, gram=True, quiet=True)
    for more in ({"gradients": True}, {"taylor": True}):
        both = pk.calibrate(model, tokenizer, few, gram=True, quiet=True, **more)
        for mine, want in zip(both.target, alone.target, strict=True):
            assert (mine.prompts, mine.tokens) == (want.prompts, want.tokens)
            for name, value in vars(want).items():
                if isinstance(value, torch.Tensor):
                    atol = 1e-5 * value.abs().max().item()
                    torch.testing.assert_close(getattr(mine, name), value, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])  # gemma2 caps its logits
def test_the_squares_are_each_tokens_in_the_prompts_order(
    name, kept_bytes, tokenizer, texts, tmp_path, monkeypatch
):
    """Small pieces of the head and batches of several prompts give what autograd does for each."""
    monkeypatch.setattr(backward, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(backward, "HEAD_BYTES", 4 * 100 * 5)  # five tokens of a vocabulary of 100
    model = tiny_model(name)
    few = ["w5", *texts[:6]]
    stats = pk.calibrate(model, tokenizer, few, gram=True, gradients=True, quiet=True)
    stats.save(tmp_path / "s")
    wide, outputs, want = in_fp64(model), [], [[] for _ in stats.names]
    for view in find_mlps(wide):
        view.down_owner.register_forward_hook(lambda _, args, out: outputs.append(out))
    for text in few:
        outputs.clear()
        ids = tokenizer(text).input_ids
        loss = loss_of(wide, ids) if len(ids) > 1 else 0 * wide(torch.tensor([ids])).logits.sum()
        for mine, g in zip(want, torch.autograd.grad(loss, outputs), strict=True):
            mine.append(g[0].square().sum(-1))
    for found in (stats, NeuronStats.load(tmp_path / "s")):
        for squares, rows in zip(found.gradient_squares, want, strict=True):
            torch.testing.assert_close(squares.double(), torch.cat(rows), rtol=1e-3, atol=1e-7)
    for mine, twice in zip(
        stats.gradient_squares, stats.merge(stats).gradient_squares, strict=True
    ):
        assert torch.equal(twice, mine.repeat(2))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_loss_is_that_of_the_completions(name):
    model = tiny_model(name)
    prompts = [Tokens((4, 5, 6, 7, 8), 3), Tokens((9, 10), 2), Tokens((11, 12, 13), 0)]
    squares = output_gradients(model, find_mlps(model), prompts, quiet=True)
    wide, outputs, want = in_fp64(model), [], [[], []]
    for view in find_mlps(wide):
        view.down_owner.register_forward_hook(lambda _, args, out: outputs.append(out))
    for prompt, first in zip(prompts, (3, 2, 1), strict=True):
        outputs.clear()
        logits = wide(input_ids=torch.tensor([prompt.ids]), use_cache=False).logits[0]
        picked, labels = logits[first - 1 : -1], torch.tensor(prompt.ids[first:]).long()
        loss = F.cross_entropy(picked, labels, reduction="sum")
        for mine, g in zip(want, torch.autograd.grad(loss, outputs), strict=True):
            mine.append(g[0].square().sum(-1))
    for found, rows in zip(squares, want, strict=True):
        torch.testing.assert_close(found.double(), torch.cat(rows), rtol=1e-3, atol=1e-7)


def test_where_every_completion_was_cut_all_tokens_count(llama):
    views = find_mlps(llama)
    cut, whole = (
        output_gradients(llama, views, [Tokens((4, 5, 6, 7), scored)], quiet=True)
        for scored in (4, 0)
    )
    assert all(torch.equal(a, b) and a.any() for a, b in zip(cut, whole, strict=True))


@pytest.mark.parametrize(("name", "bare"), [("llama", True), ("gemma2", False), ("gpt2", True)])
def test_a_head_that_is_not_the_whole_of_the_logits_is_noticed(name, bare):
    model = tiny_model(name, **({} if bare else {"final_logit_softcapping": 30.0}))
    (batch,) = batches([Tokens((4, 5, 6))], 64)
    assert (backward._bare_head(model, batch) is not None) == bare


def test_the_model_is_left_as_it_was(llama, tokenizer, texts):
    embedding = llama.get_input_embeddings().weight
    embedding.grad = kept = torch.ones_like(embedding)
    frozen = llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    llama.train()
    pk.calibrate(llama, tokenizer, texts[:3], taylor=True, quiet=True)
    assert embedding.grad is kept
    assert not frozen.requires_grad
    assert llama.training
    others = [p for p in llama.parameters() if p is not embedding]
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in others)
    assert all(p.requires_grad for p in others if p is not frozen)
    assert not any("forward" in vars(m) or m._forward_hooks for m in llama.modules())


def test_only_one_matrix_has_a_gradient_at_a_time(llama, monkeypatch):
    """Whenever a weight's gradient is reduced, no other parameter of the model holds one."""
    held = []
    norm = torch.linalg.vector_norm

    def count(*arguments, **options):
        held.append(sum(p.grad is not None for p in llama.parameters()))
        return norm(*arguments, **options)

    views = find_mlps(llama)
    sums = [NeuronSums.zeros(view.width, "cpu") for view in views]
    monkeypatch.setattr(torch.linalg, "vector_norm", count)
    add_gradients(llama, views, [Tokens((4, 5, 6))], sums, taylor=True)
    assert held == [1] * 6  # three matrices in each of two layers


def test_halves_merge_to_the_whole_and_survive_the_disk(tmp_path, llama, tokenizer, texts):
    first, second, whole = (
        pk.calibrate(llama, tokenizer, part, taylor=True, quiet=True)
        for part in (texts[:5], texts[5:9], texts[:9])
    )
    first.merge(second).save(tmp_path / "s")
    both = NeuronStats.load(tmp_path / "s")
    for a, b in zip(both.target, whole.target, strict=True):
        torch.testing.assert_close(a.taylor, b.taylor, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(a.gradient_gram, b.gradient_gram, rtol=1e-4, atol=1e-6)
    plain = pk.calibrate(llama, tokenizer, texts[5:9], quiet=True)
    with pytest.raises(InputError, match=r"taylor: the statistics hold no taylor; .*--taylor"):
        pk.score(first.merge(plain), llama, "taylor")


def test_a_gradient_that_is_not_finite_names_the_mlp(llama, tokenizer, texts):
    with torch.no_grad():
        llama.lm_head.weight[7] = 1e38  # the logit overflows
    with pytest.raises(InputError, match=r"layers\.0\.mlp: its gradients hold NaN or Inf"):
        pk.calibrate(llama, tokenizer, texts[:2], gradients=True, quiet=True)
