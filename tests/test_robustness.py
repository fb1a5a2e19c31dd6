"""Broken or meagre input gives a sane model or one clear line, never a silently broken model."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import prunekit as pk
from prunekit.cli import main
from prunekit.compensate.base import Repair
from prunekit.errors import InputError
from tests.models import tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = ["lstsq", "sequential"]


@torch.no_grad()
def loss(model, tokenizer, texts):
    total = count = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        if ids.shape[1] > 1:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return total / count


@torch.no_grad()
def all_logits(model, tokenizer, texts):
    ids = [torch.tensor([tokenizer(text).input_ids]) for text in texts]
    return [model(input_ids=i, use_cache=False).logits.float() for i in ids]


def error(pruned, model, tokenizer, texts):
    """How far the pruned model's logits are from the dense one's, over the tokens."""
    pairs = zip(*(all_logits(m, tokenizer, texts) for m in (pruned, model)), strict=True)
    return sum((a - b).square().sum() for a, b in pairs).item()


def pruned_by(model, tokenizer, texts, method, sparsity=0.34):
    """Calibrated on the texts, scored by the default criterion, repaired by the method."""
    stats = pk.calibrate(model, tokenizer, texts, gram=True, gradients=True, quiet=True)
    plan = pk.plan(pk.score(stats, model), sparsity, multiple_of=8)
    small = pk.prune(copy.deepcopy(model), plan, stats=stats, compensate=method)
    bare = pk.prune(copy.deepcopy(model), plan, compensate="none")
    assert all(torch.isfinite(p).all() for p in small.parameters())
    return small, bare


def dead_neurons(mlps):
    for mlp in mlps:
        mlp.up_proj.weight[:50] = 0


def a_dead_layer(mlps):
    mlps[1].up_proj.weight.zero_()


def twins(mlps):
    """A singular Gram matrix: half of the neurons are copies of the others."""
    for mlp in mlps:
        mlp.gate_proj.weight[48:] = mlp.gate_proj.weight[:48]
        mlp.up_proj.weight[48:] = mlp.up_proj.weight[:48]


def an_outlier(mlps):
    """One neuron of either layer fires 10⁴ times as strongly, and counts as much as it did."""
    for mlp in mlps:
        mlp.up_proj.weight[3] *= 1e4
        mlp.down_proj.weight[:, 3] /= 1e4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [dead_neurons, a_dead_layer, twins, an_outlier])
def test_odd_models_are_repaired_for_the_better(change, method, dtype, tokenizer, texts):
    model = tiny_model("llama")
    with torch.no_grad():
        change([layer.mlp for layer in model.model.layers])
    model = model.to(dtype)
    small, bare = pruned_by(model, tokenizer, texts[:50] * 3, method)
    held_out = texts[50:]
    dense = loss(model, tokenizer, held_out)
    assert loss(small, tokenizer, held_out) < dense + 0.5
    whole = sum(out.square().sum() for out in all_logits(model, tokenizer, held_out)).item()
    rounding = 4 * torch.finfo(dtype).eps ** 2 * whole
    unrepaired = error(bare, model, tokenizer, held_out)
    assert error(small, model, tokenizer, held_out) <= unrepaired + rounding


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_two_prompts_for_96_neurons_do_no_harm(name, method, tokenizer, texts):
    model = tiny_model(name)
    longest = sorted(texts, key=len)[-2:]
    small, bare = pruned_by(model, tokenizer, longest, method)
    others = texts[:20]
    assert error(small, model, tokenizer, others) < 1.1 * error(bare, model, tokenizer, others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["gate_proj", "up_proj"])
def test_a_weight_that_is_not_finite_names_layer_and_neuron(role, bad, dtype, tokenizer, texts):
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        getattr(model.model.layers[1].mlp, role).weight[7] = bad
    with pytest.raises(InputError, match=r"layers\.1\.mlp: .*neuron 7 are not finite"):
        pk.calibrate(model, tokenizer, texts, gram=True, gradients=True, quiet=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_down_projection_that_is_not_finite_names_its_layer(bad, tokenizer, texts):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 7] = bad  # after all activations
    with pytest.raises(InputError, match=r"layers\.1\.mlp: .*neuron 7 are not finite"):
        pk.calibrate(model, tokenizer, texts, gram=True, gradients=True, quiet=True)


def test_fp16_activations_that_overflow_name_the_layer(tokenizer, texts):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] *= 1e5
    with pytest.raises(InputError, match=r"layers\.0\.mlp: neuron 5 gives NaN or Inf .*use bf16"):
        pk.calibrate(model.half(), tokenizer, texts, gram=True, gradients=True, quiet=True)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_repair_that_is_not_finite_changes_no_weight(value, tokenizer, texts, monkeypatch):
    """1e6 is finite in fp64, but not in the model's fp16."""
    from prunekit import compact

    model = tiny_model("llama").half()
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    plan = pk.plan(pk.score(stats, model, "wanda"), 0.34, multiple_of=8)
    broken = [None, Repair(torch.full((32, 64), value, dtype=torch.float64))]
    monkeypatch.setattr(compact, "sequential", lambda *_, **__: broken)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match=r"layers\.1\.mlp: its repaired .* not finite in float16"):
        pk.prune(model, plan, stats=stats)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("compensate", ["", "lstsq", "none"])
@pytest.mark.parametrize("role", ["gate_proj", "down_proj"])
def test_the_command_line_refuses_a_broken_model(role, compensate, capsys, tmp_path, folder):
    import shutil

    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        getattr(model.model.layers[1].mlp, role).weight[5, 7] = float("nan")
    model.save_pretrained(broken)
    corpus = tmp_path / "task.jsonl"
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(3, 60)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["prune", broken, "--target", corpus, "--sparsity", 0.34, "--multiple-of", 8]
    given += ["-o", tmp_path / "out", "--quiet"]
    given += ["--compensate", compensate] if compensate else []
    capsys.readouterr()
    status = main([str(a) for a in given])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "layers.1.mlp" in err
    assert "neuron" in err
    assert not (tmp_path / "out").exists()


def test_random_pruning_without_data_refuses_a_broken_model_too(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = float("nan")
    plan = pk.plan(pk.score(None, model, "random"), 0.34, multiple_of=8)
    with pytest.raises(InputError, match=r"layers\.1\.mlp: .*neuron 7 .*not finite"):
        pk.prune(model, plan)
