"""The predicted cost: FLOP as they are counted, bytes as they are written, from a config alone."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import prunekit as pk
from prunekit.arch import decoder_of
from prunekit.cli import forecast as forecast_module
from prunekit.cli import main
from prunekit.integrations.loading import load_shape
from prunekit.measure.cost import Rates, Shape, Work, measure_rates, predict
from tests.models import random_ids, tiny_model

RATES = Rates(products=4e11, wide=2e11, fp64=3e10, copy=3e10)
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 151936,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}


def sizes(layers, hidden, width, heads, groups, **more):
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        **more,
    }


# name: (configuration, parameters as published, width that stays at 35 %)
CONFIGS = {
    "1.5B": (QWEN | sizes(28, 1536, 8960, 12, 2, tie_word_embeddings=True), 1.54e9, 5824),
    "7B": (QWEN | sizes(28, 3584, 18944, 28, 4, vocab_size=152064), 7.62e9, 12288),
    "70B": (LLAMA | sizes(80, 8192, 28672, 64, 8, vocab_size=128256), 70.6e9, 18624),
}


def work(**options):
    plain = {"tokens": 1000, "prompts": 10, "gram": True, "gradients": True}
    plain |= {"scored": options.get("tokens", 1000), "eliminates": True, "method": "sequential"}
    return Work(**(plain | options))


@pytest.fixture
def fixed_rates(monkeypatch):
    monkeypatch.setattr(forecast_module, "measure_rates", lambda *_: RATES)


def counted_products(run):
    with FlopCounterMode(display=False) as counter:
        run()
    found = counter.get_flop_counts()["Global"]
    return sum(n for op, n in found.items() if str(op) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "opt"])
def test_a_forwards_and_a_backwards_flop_are_those_that_torch_counts(name):
    model = tiny_model(name, tie_word_embeddings=False)
    ids = random_ids(model, 2, 12)
    phases = predict(Shape.of(model), RATES, work(tokens=24, prompts=2, gram=False), [48, 48])
    decoder = counted_products(lambda: decoder_of(model)(input_ids=ids))
    assert phases[0].flops == pytest.approx(decoder, rel=0.06)  # biases and norms are in P
    model.requires_grad_(False)
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda *arguments: arguments[-1].requires_grad_())
    both = counted_products(lambda: model(input_ids=ids).logits.sum().backward())
    grams = 24 * 2 * 32**2
    assert phases[0].flops + phases[1].flops - grams == pytest.approx(both, rel=0.06)


def test_an_expert_costs_what_is_routed_to_it():
    model = tiny_model("mixtral")
    shape = Shape.of(model)
    assert {part for _, part in shape.mlps} == {2 / 4}
    experts = 2 * 4 * 3 * 32 * 96
    assert shape.decoder == sum(p.numel() for p in model.model.layers.parameters()) - experts / 2


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])
def test_the_bytes_on_disk_are_those_of_the_pruned_model(name, tokenizer):
    model = tiny_model(name)
    shape = Shape.of(model)
    plan = pk.plan(pk.score(None, model, "random"), 0.5, multiple_of=8)
    pk.prune(model, plan)
    written = sum(p.numel() * p.element_size() for p in model.parameters())
    assert shape.pruned_bytes(plan.widths()) == pytest.approx(written, rel=0.01)


def test_time_grows_with_tokens_and_memory_with_grams():
    shape = Shape.of(tiny_model("llama"))
    once, twice = (
        predict(shape, RATES, work(tokens=n, prompts=n // 100), [64] * 2) for n in (1000, 2000)
    )
    for one, two in zip(once[:2], twice[:2], strict=True):
        assert two.seconds == pytest.approx(2 * one.seconds)
    assert once[2].seconds == twice[2].seconds  # the score sees no token
    bare = predict(shape, RATES, work(gram=False, gradients=False, method="none"), [64] * 2)
    assert once[0].bytes - bare[0].bytes == 4 * 2 * (96**2 + 32**2)
    known = predict(shape, RATES, work(calibrates=False), [64] * 2)
    assert [phase.name for phase in known] == ["score", "repair", "save"]


def test_distillation_follows_the_repair_for_its_minutes_or_its_steps():
    shape, widths = Shape.of(tiny_model("llama")), [64] * 2
    timed = predict(shape, RATES, work(method="distill", minutes=3.0), widths)
    assert [p.name for p in timed] == [
        "calibrate",
        "gradients",
        "score",
        "repair",
        "teacher",
        "distill",
        "settle",
        "save",
    ]
    assert timed[-3].seconds == pytest.approx(180)
    ten, twenty = (
        predict(shape, RATES, work(method="distill", minutes=3.0, steps=n), widths)[-3]
        for n in (10, 20)
    )
    assert twenty.flops == pytest.approx(2 * ten.flops)
    assert ten.seconds == pytest.approx(ten.flops / RATES.products)


def test_rates_are_measured():
    rates = measure_rates(Shape.of(tiny_model("llama")), torch.bfloat16)
    assert all(value > 0 for value in (rates.products, rates.wide, rates.fp64, rates.copy))


@pytest.mark.parametrize("size", CONFIGS)
def test_a_config_alone_is_enough_for_a_dry_run(size, tmp_path, capsys, fixed_rates):
    config, parameters, width = CONFIGS[size]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["prune", str(tmp_path), "--sparsity", "0.35", "--dry-run"]
    assert main([*options, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters_dense"] == pytest.approx(parameters, rel=0.01)
    assert set(facts["widths"]) == {width}
    found = facts["forecast"]
    assert found["work"]["tokens"] == 200 * 180
    assert [p["name"] for p in found["phases"]] == [
        "calibrate",
        "gradients",
        "score",
        "repair",
        "save",
    ]
    forward = 2 * 36000 * parameters / RATES.products
    assert forward < found["seconds"] < 100 * forward
    assert found["peak_bytes"] > 2 * parameters
    assert found["output_bytes"] < 2 * parameters
    assert main(options) == 0
    text = capsys.readouterr().out
    assert f"would keep {width} of {config['intermediate_size']} neurons a layer" in text
    assert "taken to be 200 prompts of 180 tokens" in text


@pytest.mark.parametrize("size", CONFIGS)
def test_a_layer_at_a_time_takes_disk_for_memory(size, tmp_path, capsys, fixed_rates):
    config, _, _ = CONFIGS[size]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = []
    for offload in ("none", "disk"):
        options = ["--sparsity", "0.35", "--compensate", "lstsq", "--offload", offload]
        assert main(["prune", str(tmp_path), *options, "--dry-run", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["forecast"])
    whole, layer = found
    hidden, width, layers = (
        config[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    states = 36000 * hidden * 2 * (layers + 3)
    matrices = 4 * layers * (width**2 + hidden**2)
    assert (whole["spilled_bytes"], layer["spilled_bytes"]) == (0, states + matrices)
    assert layer["peak_bytes"] < 0.4 * whole["peak_bytes"]
    assert layer["peak_bytes"] > 24 * width**2
    assert main(["prune", str(tmp_path), *options, "--dry-run"]) == 0
    assert "GB more meanwhile" in capsys.readouterr().out


def test_a_dry_run_counts_tokens_and_loads_no_weight(
    tmp_path, folder, capsys, monkeypatch, fixed_rates
):
    from prunekit.cli import prune

    corpus = tmp_path / "task.jsonl"
    corpus.write_text('{"text": "w3 w4 w5"}\n{"text": "w6 w7"}\n')
    monkeypatch.setattr(prune, "load", None)
    monkeypatch.setattr(prune, "calibrate", None)
    given = ["prune", str(folder), "--target", str(corpus), "--sparsity", "0.5"]
    assert main([*given, "--multiple-of", "16", "--dry-run", "--json"]) == 0
    work = json.loads(capsys.readouterr().out)["forecast"]["work"]
    assert (work["tokens"], work["prompts"], work["method"]) == (5, 2, "sequential")


def test_a_run_says_before_it_begins_what_it_will_take(tmp_path, folder, capsys, fixed_rates):
    corpus = tmp_path / "task.jsonl"
    corpus.write_text("".join(f'{{"text": "w{i} w{i + 1} w4"}}\n' for i in range(3, 60)))
    given = ["prune", str(folder), "--target", str(corpus), "--sparsity", "0.5"]
    given += ["--multiple-of", "16", "-o", str(tmp_path / "out")]
    assert main(given) == 0
    assert "prunekit: predicted 57 prompts, 171 tokens: " in capsys.readouterr().err
    assert main([*given, "--force", "--quiet"]) == 0
    assert "predicted" not in capsys.readouterr().err


def test_the_meta_model_has_the_shape_of_the_loaded_one(folder):
    from prunekit.integrations.loading import load

    assert Shape.of(load_shape(str(folder))) == Shape.of(load(folder, device="cpu"))
