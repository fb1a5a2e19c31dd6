"""Damaged checkpoints of every form: each damage is one clear line, and never random weights."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.checkpoint import verify
from prunekit.checkpoint.nested import NESTED, save_nested
from prunekit.checkpoint.padded import pad
from prunekit.checkpoint.shards import INDEX, Shards
from prunekit.checkpoint.stream import Checkpoint, stream_prune
from prunekit.cli import main
from prunekit.errors import CheckError, InputError
from prunekit.integrations.loading import load_shape
from prunekit.plan import PrunePlan
from tests.models import logits, tiny_model

FORMS = ("ordinary", "sharded", "streamed", "uneven", "padded", "nested")
RECORDED = [form for form in FORMS if form != "sharded"]  # which transformers wrote
INDEXED = ("sharded", "streamed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of each form."""
    root = tmp_path_factory.mktemp("whole")
    model = tiny_model("llama")
    scores = [torch.rand(view.width) for view in find_mlps(model)]
    plan = pk.plan(scores, 0.5, multiple_of=8)
    model.save_pretrained(root / "sharded", max_shard_size="40KB")
    shape = load_shape(str(root / "sharded"))
    stream_prune(Checkpoint(root / "sharded", shape), plan, root / "streamed")
    save_nested(model, None, root / "nested", scores, multiple_of=8)
    pk.save(pk.prune(model, plan, compensate="none"), None, root / "ordinary")
    kept = tuple(torch.arange(k, dtype=torch.int32) for k in (16, 32))
    model = tiny_model("llama")
    pk.prune(model, PrunePlan(kept, (96, 96)), compensate="none")
    pk.save(model, None, root / "uneven")
    pk.save(pad(model), None, root / "padded")
    return root


@pytest.fixture
def broken(whole, tmp_path, request):
    """A copy to be damaged."""
    form = request.getfixturevalue("form")
    shutil.copytree(whole / form, tmp_path / form)
    return tmp_path / form


def weights(folder):
    """The last file of weights."""
    files = [*folder.glob("model*.safetensors"), *folder.glob(NESTED)]
    return max(files)


def loaded(folder):
    return pk.load(folder, sparsity=0.5 if (folder / NESTED).exists() else None)


def one_line(error):
    return "\n" not in str(error.value)


def refused(capsys, *arguments):
    """Exit status and the one line of it."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return status, err


@pytest.mark.parametrize("form", RECORDED)
def test_any_byte_that_flips_is_found(form, broken, capsys):
    """In a tensor or in a header, of any form: told by a check that failed, or as a broken file."""
    path = weights(broken)
    content, draw = path.read_bytes(), random.Random(0)
    length = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *draw.sample(range(8, length), 60)]
    places += draw.sample(range(length, len(content)), 12)
    assert verify(broken) > 10
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises((CheckError, InputError)) as found:
            verify(broken)
        assert one_line(found), found.value
        assert place >= 8 or isinstance(found.value, InputError)
        assert place < length or isinstance(found.value, CheckError)
    status, line = refused(capsys, "inspect", broken, "--verify")
    assert status == 1
    assert "is not what was written; get it anew" in line


@pytest.mark.parametrize("form", FORMS)
def test_a_header_that_was_damaged_loads_as_it_was_or_not_at_all(form, broken):
    """Loading hashes nothing: but no damage of a header gives anything but a line or a model."""
    path = weights(broken)
    content, draw = path.read_bytes(), random.Random(1)
    length = 8 + int.from_bytes(content[:8], "little")
    for place in draw.sample(range(length), 30):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            model, line = loaded(broken), ""
        except InputError as error:
            model, line = None, str(error)
        assert "\n" not in line
        assert line or torch.isfinite(logits(model)).all()


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def grow(path):
    path.write_bytes(path.read_bytes() + b"12345")


def behead(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


def lose(path):
    path.unlink()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "bytes where its header says"),
        (grow, "bytes where its header says"),
        (behead, "its header is cut short"),
        (empty, "its header is cut short"),
        (lose, "safetensors"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_all(form, damage, message, broken, capsys):
    damage(weights(broken))
    with pytest.raises(InputError, match=message) as found:
        loaded(broken)
    assert one_line(found)
    status, line = refused(capsys, "diff", broken, broken)
    assert status == 2
    assert message in line
    if form in RECORDED:
        status, line = refused(capsys, "inspect", broken, "--verify")
        assert status == 2
        assert message in line


def swap(said, names):
    """A tensor in a file that has it not."""
    first = min(said["weight_map"])
    said["weight_map"][first] = next(n for n in names if n != said["weight_map"][first])


def invent(said, names):
    """A tensor that no file has."""
    said["weight_map"]["model.layers.9.mlp.up_proj.weight"] = names[0]


def elsewhere(said, names):
    """A file that is not there."""
    said["weight_map"][min(said["weight_map"])] = "model-00009-of-00009.safetensors"


@pytest.mark.parametrize("form", INDEXED)
@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (swap, "does not fit its shards: lm_head.weight is not in model-"),
        (invent, r"does not fit its shards: model\.layers\.9\.mlp\.up_proj\.weight is not in"),
        (elsewhere, "model-00009-of-00009.safetensors: no such file"),
    ],
)
def test_an_index_that_lies_is_refused_by_all(form, lie, message, broken, capsys):
    said = json.loads((broken / INDEX).read_text())
    lie(said, sorted(set(said["weight_map"].values())))
    (broken / INDEX).write_text(json.dumps(said))
    for read in (Shards, loaded):
        with pytest.raises(InputError, match=message) as found:
            read(broken)
        assert one_line(found)
    options = ("--strategy", "random", "--sparsity", 0.5, "--multiple-of", 8, "--no-load")
    status, _ = refused(capsys, "prune", broken, *options, "-o", broken.parent / "out")
    assert status == 2
    assert not (broken.parent / "out").exists()
    if form in RECORDED:
        assert refused(capsys, "inspect", broken, "--verify")[0] == 2


@pytest.mark.parametrize("form", INDEXED)
def test_what_an_index_says_wrongly_but_harmlessly_is_no_matter(form, broken, whole):
    said = json.loads((broken / INDEX).read_text())
    said["metadata"]["total_size"] = 7
    files = list(said["weight_map"].values())
    one = min(name for name, file in said["weight_map"].items() if files.count(file) > 1)
    said["weight_map"].pop(one)  # the file that holds it is read for others
    (broken / INDEX).write_text(json.dumps(said))
    assert torch.equal(logits(loaded(broken)), logits(loaded(whole / form)))
    assert form not in RECORDED or verify(broken) == len(Shards(whole / form).entries)


@pytest.mark.parametrize("form", ["ordinary", "uneven", "padded"])
def test_a_tensor_in_no_file_is_no_random_one(form, broken, capsys):
    path = broken / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    (broken / INDEX).unlink()  # which would tell it first
    message = r"hold no model\.layers\.1\.mlp\.down_proj\.weight, of 1 tensors that are missing"
    with pytest.raises(InputError, match=message) as found:
        loaded(broken)
    assert one_line(found)
    status, line = refused(capsys, "inspect", broken, "--verify")
    assert status == 1
    assert "do not fit: model.layers.1.mlp.down_proj.weight" in line


def test_a_tensor_of_another_shape_is_named(tmp_path, capfd):
    folder = tmp_path / "m"
    tiny_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    capfd.readouterr()
    message = r"down_proj\.weight is \[32, 96\], but the configuration says \[32, 64\]"
    with pytest.raises(InputError, match=message):
        pk.load(folder)
    assert capfd.readouterr().err == ""  # no report of transformers' beside it


@pytest.mark.parametrize("form", RECORDED)
def test_a_record_that_is_broken_is_refused(form, broken, capsys):
    path = broken / "prunekit.json"
    whole = json.loads(path.read_text())
    for said, message in (
        ("{", "is not JSON"),
        ("[]", "is no record of a model: it: got list; expected dict"),
        ("{}", "is no record of a model: it lacks format"),
        (json.dumps({k: v for k, v in whole.items() if k != "dtype"}), "it lacks dtype"),
        (json.dumps(whole | {"sha256": 3}), "has no hashes to verify by"),
    ):
        path.write_text(said)
        status, line = refused(capsys, "inspect", broken, "--verify")
        assert status == 2
        assert message in line


def test_a_nested_file_remembers_its_calibration_and_is_verified(
    tmp_path, capsys, tokenizer, texts
):
    model = tiny_model("llama")
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    options = {"stats": stats, "anchors": (0.5,), "compensate": "lstsq", "multiple_of": 8}
    folder = save_nested(model, None, tmp_path / "n", pk.score(stats, model, "wanda"), **options)
    assert main(["inspect", str(folder), "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    entries = 2 + 2 * 3 + 2 + 2 * 6 + 3  # orders, matrices, repairs; attention, norms; the rest
    assert (said["kind"], said["verified"]) == ("nested", entries)
    card = (folder / "README.md").read_text()
    assert "prunekit.load(" in card
    assert "| repaired at | 50.0% removed |" in card
    assert stats.provenance["corpora"][0]["hash"] in card
    record = json.loads((folder / "prunekit.json").read_text())
    assert record["bytes"] == (folder / NESTED).stat().st_size
    half = pk.save(pk.load(folder, sparsity=0.5), None, tmp_path / "half")
    again = json.loads((half / "prunekit.json").read_text())
    assert again["stats"] == record["stats"] == stats.hash
    assert again["calibration"] == stats.provenance
