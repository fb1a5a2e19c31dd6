"""Repairs solve what they claim to solve."""

import copy

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.compensate import RIDGE, repair
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
    with pytest.raises(InputError, match="expected one of none, bias, lstsq"):
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

    assert error("lstsq") < 0.9 * error("none")


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
