"""A checkpoint pruned on disk is, tensor by tensor, what pruning it in memory gives."""

import json

import pytest
import torch
from safetensors.torch import load_file

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.checkpoint import read_record, verify
from prunekit.checkpoint.shards import INDEX, Shards
from prunekit.checkpoint.stream import Checkpoint, stream_prune
from prunekit.errors import CheckError, InputError
from prunekit.integrations.loading import load_shape
from prunekit.plan import PrunePlan
from prunekit.tensors import read_shard, write_shard
from tests.models import logits, tiny_model

NAMES = ("llama", "llama_bias", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox")
NAMES += ("phi", "gpt2", "mistral")


def uneven_plan(model):
    """A third of the first layer's neurons and half of the second's, not the first ones."""
    views = find_mlps(model)
    generator = torch.Generator().manual_seed(1)
    kept = [
        torch.randperm(v.width, generator=generator)[: v.width // d].sort().values.int()
        for v, d in zip(views, (3, 2), strict=True)
    ]
    return PrunePlan(tuple(kept), tuple(v.width for v in views))


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("model"):
            found |= load_file(path)
    return found


def saved(model, path, **options):
    model.save_pretrained(path, **options)
    (path / "extra.txt").write_text("carried over")
    return path


def streamed(folder, plan, out, **options):
    return stream_prune(Checkpoint(folder, load_shape(str(folder))), plan, out, **options)


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float32) for n in NAMES] + [("llama", torch.bfloat16)]
)
def test_it_is_what_pruning_in_memory_gives(name, dtype, tmp_path):
    model = tiny_model(name).to(dtype)
    folder = saved(model, tmp_path / "dense", max_shard_size="40KB")
    assert (folder / INDEX).exists()
    plan = uneven_plan(model)
    out = streamed(folder, plan, tmp_path / "out")
    pk.save(pk.prune(model, plan), None, tmp_path / "expected")
    mine, theirs = tensors(out), tensors(tmp_path / "expected")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == dtype for k in mine)
    assert torch.equal(logits(pk.load(out)), logits(pk.load(tmp_path / "expected")))
    assert (out / "extra.txt").read_text() == "carried over"
    assert {p.name for p in out.glob("model*")} == {p.name for p in folder.glob("model*")}
    said = json.loads((out / INDEX).read_text())
    assert said["metadata"]["total_size"] == sum(e.size for e in Shards(out))
    assert verify(out) == len(mine)
    assert read_record(out)["widths"] == plan.widths()


@pytest.mark.parametrize("name", ["llama", "llama_bias", "opt", "gpt2", "phi3"])
def test_its_repair_is_that_of_a_loaded_model(name, tmp_path, tokenizer, texts):
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    folder = saved(model, tmp_path / "dense")
    checkpoint = Checkpoint(folder, load_shape(str(folder)))
    scores = checkpoint.score(stats, "wanda")
    for a, b in zip(scores, pk.score(stats, model, "wanda"), strict=True):
        assert torch.equal(a, b)
    plan = pk.plan(scores, 0.5, multiple_of=8)
    out = stream_prune(checkpoint, plan, tmp_path / "out", stats=stats, compensate="lstsq")
    pk.prune(model, plan, stats=stats, compensate="lstsq")
    assert torch.equal(logits(pk.load(out)), logits(model))
    record = read_record(out)
    assert record["recipe"]["compensate"] == "lstsq"
    assert record["calibration"]["corpora"]


def test_experts_that_lie_on_disk_as_the_model_names_them(tmp_path):
    """transformers gives Mixtral's experts other names on disk, which is said and not guessed."""
    folder = saved(tiny_model("mixtral"), tmp_path / "dense")
    with pytest.raises(InputError, match="load it, without --no-load"):
        Checkpoint(folder, load_shape(str(folder)))


def test_a_shard_in_which_nothing_changes_is_linked(tmp_path):
    model = tiny_model("llama")
    folder = saved(model, tmp_path / "dense", max_shard_size="10KB")
    out = streamed(folder, uneven_plan(model), tmp_path / "out")
    linked = [p.name for p in folder.glob("model*") if (out / p.name).samefile(p)]
    changed = [s for s in Shards(folder).shards if any(".mlp." in e.name for e in s.entries)]
    assert linked
    assert not {s.path.name for s in changed} & set(linked)


def test_nothing_is_written_where_a_weight_is_not_finite(tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    folder = saved(model, tmp_path / "dense")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        streamed(folder, uneven_plan(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_model_and_a_repair_that_runs_the_model_are_refused(tmp_path):
    model = tiny_model("llama")
    folder = saved(model, tmp_path / "dense")
    other = PrunePlan((torch.arange(4).int(),) * 2, (8, 8))
    with pytest.raises(InputError, match="made for another model"):
        streamed(folder, other, tmp_path / "out")
    with pytest.raises(InputError, match="compensate sequential runs the model"):
        streamed(folder, uneven_plan(model), tmp_path / "out", compensate="sequential")


def break_header(folder):
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def cut(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def grow(folder):
    with (folder / "model-00002-of-00002.safetensors").open("ab") as file:
        file.write(b"12345")


def lose(folder):
    (folder / "model-00001-of-00002.safetensors").unlink()


def rename(folder, name):
    said = json.loads((folder / INDEX).read_text())
    first = min(k for k, v in said["weight_map"].items() if v != name)
    said["weight_map"][first] = name
    (folder / INDEX).write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_header, "is no whole safetensors file: its header is cut short"),
        (cut, "bytes where its header says"),
        (grow, "bytes where its header says"),
        (lose, "model-00001-of-00002.safetensors: no such file"),
        (lambda f: rename(f, "../model.safetensors"), "which is no file of this folder"),
        (lambda f: rename(f, 7), "is no index"),
        (lambda f: rename(f, "model-00002-of-00002.safetensors"), "does not fit its shards"),
        (lambda f: (f / INDEX).write_text("{"), "is no index"),
        (lambda f: (f / INDEX).unlink(), "has neither model.safetensors nor"),
    ],
)
def test_a_broken_checkpoint_gives_one_line(damage, message, tmp_path):
    model = tiny_model("llama")
    folder = saved(model, tmp_path / "dense", max_shard_size="80KB")
    assert len(list(folder.glob("model-*"))) == 2
    damage(folder)
    with pytest.raises(InputError, match=message) as found:
        Shards(folder)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 0}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        b"[" * 100_000,
    ],
)
def test_a_header_that_lies_is_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError) as found:
        read_shard(path)
    assert "\n" not in str(found.value)


def test_what_is_written_is_read_by_safetensors(tmp_path):
    values = {
        "a": torch.randn(3, 5),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "b": torch.randn(700, 3000).to(torch.bfloat16),
    }
    source, path = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    planned = [
        ("a", "F32", (3, 5)),
        ("empty", "F32", (0, 4)),
        ("scalar", "I64", ()),
        ("b", "BF16", (700, 3000)),
    ]
    first = write_shard(source, planned, values.values(), {"format": "pt"})
    copied = write_shard(path, planned, read_shard(source).entries, {"format": "pt"})
    assert source.read_bytes() == path.read_bytes()
    assert first == copied == {e.name: e.sha256() for e in read_shard(path).entries}
    again = load_file(path)
    assert all(torch.equal(again[k], v) for k, v in values.items())


def test_verifying_names_the_tensor_in_which_a_byte_flipped(tmp_path):
    folder = pk.save(tiny_model("llama"), None, tmp_path / "out")
    assert verify(folder) == len(tensors(folder))
    path = folder / "model.safetensors"
    entry = Shards(folder).entries["model.layers.1.mlp.up_proj.weight"]
    content = bytearray(path.read_bytes())
    content[entry.start + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CheckError, match=r"layers\.1\.mlp\.up_proj\.weight is not what was written"
    ):
        verify(folder)
    record = json.loads((folder / "prunekit.json").read_text())
    for said, message in (({}, "it lacks format"), (record | {"sha256": None}, "has no hashes")):
        (folder / "prunekit.json").write_text(json.dumps(said))
        with pytest.raises(InputError, match=message):
            verify(folder)
