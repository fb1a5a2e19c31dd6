"""A nested checkpoint gives, at any sparsity, the model that pruning gives, and reads no more."""

import json

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.checkpoint.nested import NESTED, Nested, save_nested
from prunekit.checkpoint.padded import pad
from prunekit.errors import InputError
from prunekit.plan import PrunePlan
from prunekit.tensors import Entry, read_shard, write_shard
from tests.models import TINY, logits, tiny_model

NAMES = [name for name in TINY if "moe" not in name and name != "mixtral"]


def scored(model):
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(9, (v.width,), generator=generator).float() for v in find_mlps(model)]


@pytest.mark.parametrize("name", NAMES)
def test_every_sparsity_is_the_pruned_model_bit_for_bit(name, tmp_path):
    model, scores = tiny_model(name), scored(tiny_model(name))
    folder = save_nested(model, None, tmp_path / "nested", scores, multiple_of=8)
    for sparsity in (0.0, 0.1, 0.25, 0.5):
        expected = tiny_model(name)
        if sparsity:
            pk.prune(expected, pk.plan(scores, sparsity, multiple_of=8))
        found = pk.load(folder, sparsity=sparsity)
        assert torch.equal(logits(found), logits(expected))
        assert [v.width for v in find_mlps(found)] == [v.width for v in find_mlps(expected)]


def test_only_what_is_kept_is_read(tmp_path, monkeypatch):
    model = tiny_model("llama")
    folder = save_nested(model, None, tmp_path / "nested", scored(model), multiple_of=8)
    counted = []
    plain = Entry.read

    def read(entry):
        counted.append((entry.name, entry.size))
        return plain(entry)

    monkeypatch.setattr(Entry, "read", read)
    found = pk.load(folder, sparsity=0.5)
    inside = sum(size for name, size in counted if ".mlp." in name)
    dense = sum(4 * p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    assert inside == dense / 2 == found.prunekit["bytes_read"]


@pytest.mark.parametrize("name", ["llama", "llama_bias", "phi3", "gpt2"])
@pytest.mark.parametrize("method", ["lstsq", "sequential"])
def test_an_anchor_is_the_repaired_model(name, method, tmp_path, tokenizer, texts, caplog):
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    scores, before = pk.score(stats, model), logits(model)
    options = {"stats": stats, "anchors": (0.3, 0.5), "compensate": method, "multiple_of": 8}
    folder = save_nested(model, None, tmp_path / "nested", scores, **options)
    assert torch.equal(logits(model), before)
    for sparsity in options["anchors"]:
        plan = pk.plan(scores, sparsity, multiple_of=8)
        expected = pk.prune(tiny_model(name), plan, stats=stats, compensate=method)
        assert torch.equal(logits(pk.load(folder, sparsity=sparsity)), logits(expected))
    assert not caplog.records
    between = pk.load(folder, sparsity=0.4)
    assert "is not repaired" in caplog.text
    plain = pk.prune(tiny_model(name), pk.plan(scores, 0.4, multiple_of=8))
    assert torch.equal(logits(between), logits(plain))


def test_it_is_saved_as_an_ordinary_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    folder = save_nested(model, None, tmp_path / "nested", scored(model), multiple_of=8)
    half = pk.load(folder, sparsity=0.5)
    pk.save(half, None, tmp_path / "half")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    assert torch.equal(logits(plain), logits(half))
    with pytest.raises(InputError, match="it is no nested checkpoint"):
        pk.load(tmp_path / "half", sparsity=0.5)
    with pytest.raises(InputError, match="expected a fraction"):
        pk.load(folder, sparsity=1.0)
    with pytest.raises(InputError, match="mixture of experts"):
        moe = tiny_model("mixtral")
        save_nested(moe, None, tmp_path / "moe", scored(moe))


def rewrite(folder, change):
    """Write the file anew with other facts."""
    path = folder / NESTED
    shard = read_shard(path)
    facts = json.loads(shard.metadata["prunekit"])
    tensors = {entry.name: entry.read() for entry in shard.entries}
    change(facts, tensors)
    names = {torch.float32: "F32", torch.int32: "I32"}
    planned = [(n, names[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    write_shard(path, planned, tensors.values(), {"prunekit": json.dumps(facts)})


@pytest.mark.parametrize(
    "change",
    [
        lambda facts, tensors: facts.update(kind="other"),
        lambda facts, tensors: facts.update(version=2),
        lambda facts, tensors: facts.pop("slots"),
        lambda facts, tensors: facts.update(dense_widths=[96]),
        lambda facts, tensors: facts.update(dense_widths=[97, 96]),
        lambda facts, tensors: facts.update(dense_widths="ab"),
        lambda facts, tensors: facts.update(anchors=[[1]]),
        lambda facts, tensors: facts.update(recipe=None),
        lambda facts, tensors: tensors.pop("order.1"),
        lambda facts, tensors: tensors.update({"order.1": tensors["order.1"] * 0}),
        lambda facts, tensors: tensors.update({"order.1": tensors["order.1"].float()}),
        lambda facts, tensors: tensors.pop("model.norm.weight"),
    ],
)
def test_a_file_that_lies_gives_one_line(change, tmp_path):
    model = tiny_model("llama")
    folder = save_nested(model, None, tmp_path / "nested", scored(model), multiple_of=8)
    rewrite(folder, change)
    with pytest.raises(InputError) as found:
        pk.load(folder, sparsity=0.5)
    assert "\n" not in str(found.value)


def test_a_file_cut_short_gives_one_line(tmp_path):
    model = tiny_model("llama")
    folder = save_nested(model, None, tmp_path / "nested", scored(model))
    path = folder / NESTED
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="bytes where its header says"):
        Nested.open(folder)


@pytest.mark.parametrize("name", [*NAMES, "mixtral", "qwen3_moe"])
def test_a_padded_model_computes_the_same_and_loads_anywhere(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(name)
    views = find_mlps(model)
    kept = tuple(torch.arange(16 + 8 * v.layer, dtype=torch.int32) for v in views)
    pk.prune(model, PrunePlan(kept, tuple(v.width for v in views)))
    padded = pad(model)
    assert {v.width for v in find_mlps(padded)} == {24}
    folder = pk.save(padded, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "import prunekit" not in card
    assert "filled up with zeros to 24" in card
