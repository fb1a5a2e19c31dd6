"""Repairs solve what they claim to solve."""

import copy

import pytest
import torch

import prunekit as pk
from prunekit import ops
from prunekit.arch import find_mlps
from prunekit.backward import calling_instead
from prunekit.compensate import RIDGE, importance, repair, sequential
from prunekit.compensate.regression import FLOOR, Regression
from prunekit.compensate.sequential import _groups, _Layer
from prunekit.compensate.streams import Narrowed
from prunekit.errors import InputError
from prunekit.stats import NeuronSums
from tests.models import logits, tiny_model


def sums_of(h: torch.Tensor) -> NeuronSums:
    sums = NeuronSums.zeros(h.shape[1], "cpu", gram=True)
    sums.tokens = h.shape[0]
    sums.token_sum += h.double().sum(0)
    sums.gram += (h.double().T @ h.double()).float()
    return sums


@pytest.fixture
def activations():
    """h [T, F] of rank 20, so that removed neurons can be told from kept ones."""
    return torch.randn(400, 20) @ torch.randn(20, 96) + 0.3


def test_lstsq_minimises_the_ridge_objective(activations):
    view = find_mlps(tiny_model("llama"))[0]
    kept = torch.arange(0, 96, 2)
    h, down = activations.double(), view.down.detach().double()
    fixed = repair(view, sums_of(activations), kept, "lstsq").down
    ridge = RIDGE * h[:, kept].square().mean(0).mean()

    def gradient(weight):
        residual = h[:, kept] @ weight.T - h @ down.T
        return residual.T @ h[:, kept] / len(h) + ridge * (weight - down[:, kept])

    # At the minimum the gradient vanishes; beside it, at the unrepaired weight, it does not.
    assert gradient(fixed).norm() < 1e-4 * gradient(down[:, kept]).norm()


def test_lstsq_is_exact_where_the_kept_neurons_span_the_removed(activations):
    view = find_mlps(tiny_model("llama"))[0]
    kept = torch.arange(48)
    fixed = repair(view, sums_of(activations), kept, "lstsq").down
    want = activations.double() @ view.down.detach().double().T
    got = activations[:, kept].double() @ fixed.T
    unrepaired = activations[:, kept].double() @ view.down.detach().double()[:, kept].T
    assert (got - want).norm() < 0.02 * (unrepaired - want).norm()


@pytest.mark.parametrize("method", ["bias", "lstsq"])
def test_a_bias_takes_the_mean_error(method, activations):
    view = find_mlps(tiny_model("gpt2"))[0]
    h = torch.cat([activations, activations[:, :32]], dim=1)  # gpt2 has 128 neurons
    kept = torch.arange(0, 128, 4)
    fix = repair(view, sums_of(h), kept, method)
    want = h.double() @ view.down.detach().double().T + view.down_bias.detach().double()
    got = h[:, kept].double() @ fix.down.T + fix.bias
    assert (got - want).mean(0).norm() < 1e-5 * want.mean(0).norm()


def test_a_model_without_tokens_or_method_is_left_alone(activations):
    view = find_mlps(tiny_model("llama"))[0]
    kept = torch.arange(48)
    assert repair(view, NeuronSums.zeros(96, "cpu", gram=True), kept, "lstsq") is None
    assert repair(view, sums_of(activations), kept, "none") is None


def test_lstsq_without_a_gram_matrix_says_so(llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts, quiet=True)
    plan = pk.plan(pk.score(stats, llama), 0.5)
    with pytest.raises(InputError, match="calibrate with --gram"):
        pk.prune(llama, plan, stats=stats, compensate="lstsq")


def test_an_unknown_method_lists_the_valid_ones(llama):
    plan = pk.plan([torch.rand(96)] * 2, 0.5)
    with pytest.raises(InputError, match="expected one of none, bias, lstsq, sequential"):
        pk.prune(llama, plan, compensate="magic")


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2", "qwen2_moe"])
def test_repair_brings_the_logits_closer_on_the_calibration_tokens(name, tokenizer, texts):
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts * 5, gram=True, quiet=True)
    plan = pk.plan(pk.score(stats, model), 0.4, multiple_of=8)
    ids = torch.tensor([tokenizer(max(texts, key=len)).input_ids])

    @torch.no_grad()
    def error(method):
        pruned = copy.deepcopy(model)
        pk.prune(pruned, plan, stats=stats, compensate=method)
        return (pruned(input_ids=ids).logits - model(input_ids=ids).logits).norm()

    plain = error("none")
    assert error("lstsq") < 0.9 * plain
    assert error("sequential") < 0.9 * plain


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "gemma2"])
def test_sequential_leaves_the_dense_model_bit_for_bit(name, dtype, tokenizer, texts):
    model = tiny_model(name).to(dtype)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    views = find_mlps(model)
    kept = pk.plan(pk.score(stats, model), 0.5, multiple_of=8).kept
    before = weights_of(model)
    fixes = sequential(model, views, kept, stats, quiet=True)
    assert all(torch.isfinite(fix.down).all() for fix in fixes)
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.dtype == dtype and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["llama_bias", "phi3", "phi", "opt", "gpt2"])
def test_a_narrowed_mlp_computes_the_neurons_that_stay(name):
    """But for GPT-2, whose projections know their width otherwise: they stay whole."""
    model = tiny_model(name)
    view = find_mlps(model)[0]
    width, kept = view.width, torch.tensor([0, 3, 4, 40, 95])
    seen = []
    handle = view.down_owner.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    ids = torch.arange(3, 9)[None]
    model(ids)
    with Narrowed(view, kept), calling_instead(view.down_owner, lambda h: h.new_zeros(1, 6, 32)):
        model(ids)
    handle.remove()
    whole, narrow = seen
    if name == "gpt2":
        assert torch.equal(narrow, whole)
    else:
        torch.testing.assert_close(narrow, whole[..., kept])
    assert view.width == width
    assert torch.equal(model(ids).logits, tiny_model(name)(ids).logits)


def test_sequential_solves_the_second_layer_on_the_pruned_first(llama, tokenizer, texts):
    """Against a direct fp64 solution on activations taken by hooks, ridge and weights as chosen."""
    stats = pk.calibrate(llama, tokenizer, texts, gram=True, quiet=True)
    views = find_mlps(llama)
    kept = [k.long() for k in pk.plan(pk.score(stats, llama), 0.5, multiple_of=8).kept]
    chosen = []
    fit = Regression._fit

    def spy(self, gram, cross, ridge):
        chosen.append(ridge)
        return fit(self, gram, cross, ridge)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Regression, "_fit", spy)
        fixes = sequential(llama, views, kept, stats, quiet=True)
    ridge = chosen[-1]  # the last fit is the second layer's, on all prompts
    groups = _groups(stats)
    weights = importance.token_weights(llama, views, stats)[1]
    prompts = weights.split([len(p.ids) for p in stats.prompts])
    weights = torch.cat([prompts[i] for batch in groups for i in batch.index])
    llama = llama.double()
    dense = second_layer(llama, groups)
    with torch.no_grad():
        views[0].down.zero_()
        views[0].down[:, kept[0]] = fixes[0].down.float().double()
    pruned = second_layer(llama, groups)
    y, h = dense["y"], pruned["h"][:, kept[1]]
    aim = y + 0.75 * ((dense["out"] - y) - (pruned["out"] - pruned["y"]))
    down = views[1].down.detach()[:, kept[1]]
    w = weights.double()[:, None]
    gram = (h * w).T @ h
    floor = FLOOR * gram.diagonal().mean()
    gram.diagonal().mul_(1 + ridge).add_(floor)
    want = down + torch.linalg.solve(gram, (h * w).T @ (aim - h @ down.T)).T
    assert (fixes[1].down - want).norm() < 1e-3 * (want - down).norm()


@torch.no_grad()
def second_layer(model, groups):
    """h, y and the layer's output of layer 1, rows of prompts only, in the order of the batches."""
    found = {"h": [], "y": [], "out": []}
    layer = model.model.layers[1]

    def mlp(module, arguments, output):
        found["h"].append(arguments[0])
        found["y"].append(output)

    handles = [
        layer.mlp.down_proj.register_forward_hook(mlp),
        layer.register_forward_hook(lambda module, arguments, out: found["out"].append(out)),
    ]
    rows = []
    for batch in groups:
        model(input_ids=batch.ids)
        rows.append(torch.arange(batch.ids.shape[1]) < torch.tensor(batch.lengths)[:, None])
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([t[mask] for t, mask in zip(many, rows, strict=True)])
        for name, many in found.items()
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_calibrations_gradients_spare_the_backward(name, tokenizer, texts, monkeypatch):
    model = tiny_model(name)
    options = {"gram": True, "quiet": True}
    kept = pk.plan(pk.score(None, model, "random"), 0.5, multiple_of=8).kept
    without = pk.calibrate(model, tokenizer, texts, **options)
    want = sequential(model, find_mlps(model), kept, without, quiet=True)
    stats = pk.calibrate(model, tokenizer, texts, gradients=True, **options)
    monkeypatch.setattr(importance, "output_gradients", None)
    for mine, theirs in zip(
        sequential(model, find_mlps(model), kept, stats, quiet=True), want, strict=True
    ):
        # Calibration's activation is torch's: GPT-2's own rounds otherwise.
        close = {"rtol": 1e-4, "atol": 1e-5} if name == "gpt2" else {}
        torch.testing.assert_close(mine.down, theirs.down, **close)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_pruned_stream_is_that_of_the_pruned_model(name, tokenizer, texts, monkeypatch):
    """What enters the last layer, and how it is called, against the model pruned for good."""
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    plan = pk.plan(pk.score(stats, model), 0.5, multiple_of=8)
    streams = []
    add = _Layer.repair

    def repair_and_keep(self, dense, pruned, *rest):
        streams.append([h.clone() for h in pruned])
        return add(self, dense, pruned, *rest)

    monkeypatch.setattr(_Layer, "repair", repair_and_keep)
    pruned = copy.deepcopy(model)
    pk.prune(pruned, plan, stats=stats, compensate="sequential")
    for batch, stream in zip(_groups(stats), streams[-1], strict=True):
        with torch.no_grad():
            out = pruned(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(out.hidden_states[-2], stream, rtol=1e-4, atol=1e-4)


def test_a_regression_is_weighted_least_squares_with_an_intercept():
    h, error, w = torch.randn(200, 12), torch.randn(200, 5) + 2, torch.rand(200) + 0.1
    problem = Regression(5, 12, torch.device("cpu"), intercept=True)
    problem.add(h[:150], error[:150], w[:150], held_out=False)
    problem.add(h[150:], error[150:], w[150:], held_out=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Regression, "_choose", lambda *_: 0.0)
        change, shift = problem.solve()
    one = torch.cat([h, torch.ones(200, 1)], dim=1).double()
    root = w.sqrt()[:, None].double()
    want = torch.linalg.lstsq(one * root, error.double() * root).solution.T
    assert torch.allclose(torch.cat([change, shift[:, None]], 1), want, atol=1e-4)


def test_held_out_batches_choose_no_change_where_there_is_nothing_to_learn():
    """Few tokens and errors that no neuron explains: every ridge would fit noise."""
    problem = Regression(4, 60, torch.device("cpu"), intercept=False)
    for half in (False, True):
        noise = torch.randn(64, 4)
        problem.add(torch.randn(64, 60), noise, torch.ones(64), held_out=half)
    grams = [ops.symmetrize_(gram).double() for gram in problem.gram]
    assert problem._choose(grams, list(problem.cross.double())) == float("inf")
    change, _ = problem.solve()
    assert not change.any()


def test_fewer_tokens_than_neurons_and_dead_neurons_repair_finitely(llama, tokenizer):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[:50] = 0  # half of them never fire
        llama.model.layers[1].mlp.up_proj.weight.zero_()  # none does
    stats = pk.calibrate(llama, tokenizer, ["w1 w2 w3 w4", "w5 w6"], gram=True, quiet=True)
    plan = pk.plan(pk.score(stats, llama), 0.25, multiple_of=8)
    pk.prune(llama, plan, stats=stats, compensate="sequential")
    assert all(torch.isfinite(p).all() for p in llama.parameters())
    assert torch.isfinite(logits(llama)).all()


def test_statistics_without_prompts_are_refused_and_repaired_by_lstsq(llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts, gram=True, quiet=True)
    stats.prompts = None
    plan = pk.plan(pk.score(stats, llama), 0.5, multiple_of=8)
    with pytest.raises(InputError, match="hold no prompts; calibrate with --gram"):
        pk.prune(llama, plan, stats=stats, compensate="sequential")
    pk.prune(llama, plan, stats=stats)
    assert llama.prunekit["compensate"] == "lstsq"


def test_prompts_survive_the_disk(llama, tokenizer, texts, tmp_path):
    stats = pk.calibrate(llama, tokenizer, texts, gram=True, quiet=True)
    stats.save(tmp_path / "stats")
    assert pk.NeuronStats.load(tmp_path / "stats").prompts == stats.prompts
    assert stats.merge(stats).prompts == 2 * stats.prompts


def test_bias_opens_llamas_own_bias_and_refuses_where_there_is_none(llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts, quiet=True)
    plan = pk.plan(pk.score(stats, llama), 0.5)
    pk.prune(llama, plan, stats=stats, compensate="bias")
    assert llama.config.mlp_bias is True
    assert llama.model.layers[0].mlp.down_proj.bias.abs().sum() > 0
    assert llama.model.layers[0].mlp.gate_proj.bias.abs().sum() == 0
    qwen = tiny_model("qwen2")
    before = logits(qwen)
    stats = pk.calibrate(qwen, tokenizer, texts, quiet=True)
    with pytest.raises(InputError, match="Qwen2ForCausalLM has no bias on its down projection"):
        pk.prune(qwen, plan, stats=stats, compensate="bias")
    assert torch.equal(logits(qwen), before)
