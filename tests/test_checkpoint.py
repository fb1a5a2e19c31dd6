"""A saved model is an ordinary transformers folder that gives the live model's logits."""

import json

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.checkpoint import read_record
from prunekit.checkpoint.shards import write_index
from prunekit.errors import InputError
from prunekit.plan import PrunePlan
from tests.models import logits, tiny_model

SAVEABLE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "phi", "gpt2")
SAVEABLE += ("mixtral", "qwen2_moe", "qwen3_moe", "mistral", "llama_bias")


def halve(model, **options):
    plan = pk.plan([torch.rand(v.width) for v in find_mlps(model)], 0.5, multiple_of=8)
    return pk.prune(model, plan, **options)


@pytest.mark.parametrize("name", SAVEABLE)
def test_plain_transformers_reloads_it_bit_for_bit(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = halve(tiny_model(name))
    pk.save(model, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


def test_llama_with_an_opened_bias_reloads(tmp_path, llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts, quiet=True)
    halve(llama, stats=stats, compensate="bias")
    pk.save(llama, None, tmp_path / "out")
    assert torch.equal(logits(pk.load(tmp_path / "out")), logits(llama))


def test_the_record_tells_the_whole_recipe(tmp_path, llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts, gram=True, quiet=True)
    plan = pk.plan(
        pk.score(stats, llama),
        0.4,
        multiple_of=16,
        recipe={"criterion": "wanda", "stats": stats.hash},
    )
    pk.prune(llama, plan, stats=stats)
    results = {"loss": [{"corpus": "held", "loss": 1.5, "stderr": 0.1, "tokens": 99}]}
    folder = pk.save(llama, None, tmp_path / "out", results=results)
    record = read_record(folder)
    assert record["widths"] == [64, 64]
    assert record["dense_widths"] == [96, 96]
    assert record["sparsity"] == pytest.approx(1 / 3, abs=1e-6)
    assert record["recipe"]["sparsity"] == 0.4
    assert record["recipe"]["compensate"] == "sequential"
    assert record["stats"] == stats.hash
    assert record["calibration"]["corpora"][0]["tokens"] == stats.target[0].tokens
    assert record["parameters"] == sum(p.numel() for p in llama.parameters())
    assert record["bytes"] == (folder / "model.safetensors").stat().st_size
    kept = PrunePlan.load(folder / "plan.safetensors").kept
    assert all(torch.equal(a, b) for a, b in zip(kept, plan.kept, strict=True))
    card = (folder / "README.md").read_text()
    assert "33.33 % of the MLP neurons" in card
    assert "| held | 1.5000 | 0.1000 | 99 |" in card


def test_an_index_tells_the_weights_from_the_plan(tmp_path, llama):
    folder = pk.save(halve(llama), None, tmp_path / "out")
    said = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {name for name, _ in llama.named_parameters()}
    assert said["weight_map"] == dict.fromkeys(names, "model.safetensors")
    assert said["metadata"]["total_size"] == sum(4 * p.numel() for p in llama.parameters())
    sharded = tmp_path / "sharded"
    llama.save_pretrained(sharded, max_shard_size="20KB")
    before = (sharded / "model.safetensors.index.json").read_text()
    write_index(sharded)
    assert (sharded / "model.safetensors.index.json").read_text() == before


def test_following_a_saved_plan_gives_the_same_model(tmp_path):
    model = halve(tiny_model("llama"))
    folder = pk.save(model, None, tmp_path / "out")
    plan = PrunePlan.load(folder / "plan.safetensors")
    assert torch.equal(logits(pk.prune(tiny_model("llama"), plan)), logits(model))


def test_a_folder_that_is_not_empty_is_kept_without_force(tmp_path, llama):
    (tmp_path / "precious").write_text("x")
    for force in (False, True):  # what is no model is not replaced at all
        with pytest.raises(InputError, match="--force"):
            pk.save(llama, None, tmp_path, force=force)
    assert (tmp_path / "precious").read_text() == "x"
    folder = pk.save(llama, None, tmp_path / "out")
    pk.save(halve(llama), None, folder, force=True)
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 48


def test_a_folder_of_others_has_no_record(tmp_path):
    with pytest.raises(InputError, match="was not written by prunekit"):
        read_record(tmp_path)


@pytest.mark.parametrize("widths", [(48, 48), (40, 56)])
def test_loading_reads_the_configuration_once(widths, tmp_path, llama, monkeypatch):
    from transformers import PreTrainedConfig

    kept = tuple(torch.arange(k, dtype=torch.int32) for k in widths)
    pk.prune(llama, PrunePlan(kept, (96, 96)), compensate="none")
    folder = pk.save(llama, None, tmp_path / "out")
    read, plain = [], PreTrainedConfig._dict_from_json_file

    def counted(path, *rest):
        read.append(path)
        return plain(path, *rest)

    monkeypatch.setattr(PreTrainedConfig, "_dict_from_json_file", counted)
    assert torch.equal(logits(pk.load(folder)), logits(llama))
    assert [str(path) for path in read if "generation" not in str(path)] == [
        str(folder / "config.json")
    ]
