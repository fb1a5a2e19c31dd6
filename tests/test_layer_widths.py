"""MLPs that differ in width by layer: saved, loaded by prunekit and by transformers, and used."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.checkpoint.widths import DECODER_LAYERS
from prunekit.errors import InputError
from prunekit.integrations.layer_widths import install
from prunekit.plan import PrunePlan
from tests.models import TINY, logits, tiny_model

LOADABLE = [name for name in TINY if "moe" not in name and name != "mixtral"]


def uneven(name="llama"):
    """A tiny model of two layers, whose MLPs keep a third and two thirds."""
    model = tiny_model(name)
    dense = [view.width for view in find_mlps(model)]
    kept = tuple(
        torch.arange(0, width, dtype=torch.int32)[: width * part // 3]
        for width, part in zip(dense, (1, 2), strict=True)
    )
    return pk.prune(model, PrunePlan(kept, tuple(dense)))


@pytest.mark.parametrize("name", LOADABLE)
def test_a_checkpoint_is_reloaded_and_saved_again_bit_for_bit(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = uneven(name)
    widths = [view.width for view in find_mlps(model)]
    pk.save(model, None, tmp_path / "once")
    again = pk.load(tmp_path / "once")
    assert [view.width for view in find_mlps(again)] == widths
    assert torch.equal(logits(again), logits(model))
    ids = torch.tensor([[5, 6, 7]])
    mine, theirs = (m(ids, output_hidden_states=True).hidden_states for m in (again, model))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    again.save_pretrained(tmp_path / "twice")
    install()
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()
    assert torch.equal(logits(third), logits(model))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(third.generate(ids, **options), model.generate(ids, **options))


def test_every_family_is_tried_or_known_to_transformers():
    tried = {tiny_model(name).config.model_type for name in LOADABLE}
    assert tried <= set(DECODER_LAYERS)
    install()
    for model_type, name in DECODER_LAYERS.items():
        family = model_type.removesuffix("_text")
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        once = getattr(module, name).__init__
        assert once._built_by_layer
        install([model_type])
        assert getattr(module, name).__init__ is once


def test_models_of_one_width_are_built_as_before():
    install()
    assert torch.equal(logits(tiny_model("llama")), logits(tiny_model("llama")))
    model = tiny_model("llama")
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


def test_what_is_switched_on_the_model_reaches_every_layer(tmp_path):
    pk.save(uneven(), None, tmp_path / "out")
    model = pk.load(tmp_path / "out")
    before = logits(model)
    model.set_attn_implementation("eager")
    found = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    assert found == {"eager"}
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_it_is_used_as_any_other_model(tmp_path):
    from transformers import AutoModelForCausalLM

    model = uneven()
    pk.save(model, None, tmp_path / "out")
    assert pk.load(tmp_path / "out", dtype="fp16").half().dtype == torch.float16
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="auto").eval()
    assert torch.equal(logits(spread), logits(model))
    compiled = torch.compile(pk.load(tmp_path / "out"), backend="eager", fullgraph=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-5)
    fused = pk.compact_modules(pk.load(tmp_path / "out"))
    assert torch.allclose(logits(fused), logits(model), atol=1e-5)


def test_an_adapter_is_trained_on_top(tmp_path):
    peft = pytest.importorskip("peft")
    pk.save(uneven(), None, tmp_path / "out")
    model = pk.load(tmp_path / "out")
    before = logits(model)
    options = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], r=2)
    adapted = peft.get_peft_model(model, options).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted(ids, labels=ids).loss.backward()
    optimizer.step()
    merged = adapted.eval().merge_and_unload()
    assert not torch.equal(logits(merged), before)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(pk.load(tmp_path / "merged")), logits(merged))


def test_pruning_again_may_even_the_widths_out():
    model = uneven()
    dense = tuple(view.width for view in find_mlps(model))
    assert model.config.is_heterogeneous
    kept = tuple(torch.arange(16, dtype=torch.int32) for _ in dense)
    pk.prune(model, PrunePlan(kept, dense))
    assert not model.config.is_heterogeneous
    assert model.config.intermediate_size == 16


def test_without_prunekit_transformers_refuses_it(tmp_path):
    pk.save(uneven(), None, tmp_path / "out")
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
    )
    run = [sys.executable, "-c"]
    plain = subprocess.run([*run, code], capture_output=True, text=True)
    assert plain.returncode == 1
    assert "'intermediate_size' is a per-layer attribute" in plain.stderr
    taught = "import prunekit.integrations.transformers\n" + code
    assert subprocess.run([*run, taught], capture_output=True).returncode == 0


def test_the_card_and_the_record_say_how_to_load_it(tmp_path):
    folder = pk.save(uneven(), None, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "import prunekit.integrations.transformers\n" in card
    assert "| MLP width | 96 → 32 to 64, by layer 32 64 |" in card
    said = json.loads((folder / "config.json").read_text())
    assert said["per_layer_config"] == {"0": {"intermediate_size": 32}}
    assert said["intermediate_size"] == 64


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_several_widths_are_refused_before_anything_is_written(name, tmp_path):
    model = tiny_model(name)
    views = find_mlps(model)
    kept = tuple(torch.arange(16 + 8 * v.layer, dtype=torch.int32) for v in views)
    pk.prune(model, PrunePlan(kept, tuple(v.width for v in views)))
    with pytest.raises(InputError, match="holds MLPs of one width only"):
        pk.save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
