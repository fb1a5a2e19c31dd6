"""A calibration with one layer in memory gives what one with all of them gives, bit by bit."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit as pk
from prunekit import layerwise
from prunekit.batching import batches
from prunekit.calibrate import encoded
from prunekit.checkpoint.offloaded import Offloaded
from prunekit.checkpoint.save import PLAN
from prunekit.checkpoint.shards import SINGLE
from prunekit.checkpoint.stream import Checkpoint
from prunekit.cli import main
from prunekit.errors import InputError
from prunekit.gradients import gradient_batches
from prunekit.integrations.loading import load, load_shape
from prunekit.layerwise import calibrate_layerwise, disk_bytes
from tests.models import TINY, tiny_model
from tests.same import assert_same


def offloaded(folder):
    return Offloaded(Checkpoint(folder, load_shape(folder, buffers=True)))


def few(tokenizer):
    return encoded(["w1 w2 w3"], (), tokenizer, 8)


def both(folder, tokenizer, tmp_path, target, *distractors, **wanted):
    """The statistics of one calibration, in memory and layer by layer."""
    model = load(folder, device="cpu")
    whole = pk.calibrate(model, tokenizer, target, *distractors, **wanted, quiet=True)
    spill = tmp_path / "spill"
    spill.mkdir()
    read = encoded(target, *(distractors or [()]), tokenizer, 1024)
    return whole, calibrate_layerwise(offloaded(folder), read, folder=spill, quiet=True, **wanted)


@pytest.mark.parametrize("gradients", [False, True])
def test_no_more_lies_on_disk_than_is_predicted(gradients, folder, tokenizer, texts, tmp_path):
    most, put = 0, layerwise._Hidden.put

    def watching(self, *arguments):
        nonlocal most
        put(self, *arguments)
        most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))

    read, wanted = encoded(texts, (), tokenizer, 64), {"gram": True, "gradients": gradients}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise._Hidden, "put", watching)
        calibrate_layerwise(offloaded(folder), read, folder=tmp_path, quiet=True, **wanted)
    mine = read.prompts["target"]
    groups = gradient_batches(mine, taylor=False) if gradients else batches(mine, 2048)
    tokens = sum(batch.ids.numel() for batch in groups)
    predicted = disk_bytes([96] * 2, 32, 2, 4, tokens, gram=1, backwards=int(gradients))
    headers = 400 * len(list(tmp_path.iterdir()))
    assert 0.7 * predicted < most <= predicted + headers


# transformers gives some of their tensors other names on disk, which is said and not guessed.
RENAMED = ("gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("name", [name for name in TINY if name not in RENAMED])
def test_every_architecture_gives_the_same_layer_by_layer(name, tokenizer, texts, tmp_path):
    tiny_model(name).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    wanted = {"gram": True, "gradients": True}
    first, second = both(tmp_path / "model", tokenizer, tmp_path, texts, [texts[:5]], **wanted)
    assert_same(first, second)
    left = {path.name.partition("-")[0] for path in (tmp_path / "spill").iterdir()}
    assert left == {"target"}  # matrices: hidden states are gone


@pytest.mark.parametrize("wanted", [{}, {"gram": True}, {"gradients": True}, {"taylor": True}])
@pytest.mark.parametrize("off_task", [False, True])
def test_whatever_is_gathered(wanted, off_task, tokenizer, texts, tmp_path):
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    wanted = wanted | {"off_task": off_task, "batch_tokens": 64}
    assert_same(*both(tmp_path / "model", tokenizer, tmp_path, texts, [texts[:9]], **wanted))


@pytest.mark.parametrize("name", RENAMED)
def test_other_names_on_disk_are_refused(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no tensor .* its names are not those of"):
        offloaded(tmp_path)


def test_a_tensor_that_is_missing_is_said_before_any_work(tmp_path):
    weights = tiny_model("llama").state_dict()
    tiny_model("llama").config.save_pretrained(tmp_path)
    gone = "model.layers.1.self_attn.q_proj.weight"
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / SINGLE)
    with pytest.raises(InputError, match=f"has no tensor {gone}"):
        offloaded(tmp_path)
    save_file(weights | {gone: torch.zeros(32, 8)}, tmp_path / SINGLE)
    with pytest.raises(InputError, match=rf"{gone} is \[32, 8\], but the configuration says"):
        offloaded(tmp_path)


def test_a_disk_without_room_is_refused(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match=r"need 0\.00 GB there, and 0\.00 GB are free"):
        calibrate_layerwise(offloaded(folder), few(tokenizer), folder=tmp_path, quiet=True)


def test_by_the_command(capsys, folder, texts, tmp_path):
    """Statistics, and a pruned model, with --offload disk and without."""
    corpus = tmp_path / "task.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    offload = ["--offload", "disk"]
    given = [str(folder), "--target", str(corpus), "--quiet"]
    prune = ["--sparsity", "0.5", "--multiple-of", "16", "--compensate", "lstsq"]
    for name, options in (("here", []), ("disk", offload)):
        stats, out = tmp_path / f"{name}.stats", tmp_path / name
        wanted = ["--gram", "--gradients", *options, "-o", str(stats)]
        assert main(["calibrate", *given, *wanted]) == 0
        assert main(["prune", *given, *prune, *options, "-o", str(out)]) == 0
    one, other = (pk.NeuronStats.load(tmp_path / f"{name}.stats") for name in ("here", "disk"))
    assert_same(one, other)
    assert one.hash == other.hash
    plans = [pk.PrunePlan.load(tmp_path / name / PLAN).kept for name in ("here", "disk")]
    assert all(torch.equal(a, b) for a, b in zip(*plans, strict=True))
    weights = [load_file(tmp_path / name / SINGLE) for name in ("here", "disk")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"task.jsonl", "here", "disk", "here.stats", "disk.stats"}
    assert "Gram matrices" in capsys.readouterr().out


def test_a_neuron_that_gives_nan_is_named(tokenizer, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = torch.nan
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "spill").mkdir()
    options = {"folder": tmp_path / "spill", "quiet": True}
    with pytest.raises(InputError, match=r"layers\.1\.mlp: the up weights of neuron 5"):
        calibrate_layerwise(offloaded(tmp_path / "model"), few(tokenizer), **options)


def test_embeddings_and_head_are_in_memory_only_inside_with_ends(tmp_path):
    for name, tied in (("llama", True), ("llama", False)):
        tiny_model(name, tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))
        model = offloaded(tmp_path / str(tied))
        first, last = model.ends
        assert (first.weight is last.weight) == tied
        size = first.weight.nbytes
        with model.with_ends():
            assert not first.weight.is_meta
            assert not last.weight.is_meta
            assert (first.weight is last.weight) == tied
            assert model.ends_bytes() == (1 if tied else 2) * size
        assert first.weight.is_meta
        assert last.weight.is_meta
        assert (first.weight is last.weight) == tied


@pytest.mark.slow
def test_the_demo_model_is_pruned_from_disk_in_700_mb(demo_model, tmp_path):
    model, tokenizer = demo_model
    pk.save(model, tokenizer, tmp_path / "model")
    draw = random.Random(0)
    lines = []
    for _ in range(192):
        count = min(max(int(draw.lognormvariate(4.7, 0.4)), 40), 320)  # tokens, as MBPP's rows have
        text = tokenizer.decode([draw.randrange(1000, 40000) for _ in range(count)])
        lines.append(
            json.dumps({"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :]})
        )
    corpus = tmp_path / "task.jsonl"
    corpus.write_text("\n".join(lines))
    options = ["--target", str(corpus), "--sparsity", "0.35", "--offload", "disk", "--quiet"]
    given = ["prune", str(tmp_path / "model"), *options, "-o", str(tmp_path / "out")]
    # By the process itself: to wait4 it began as large as the one that it was forked from.
    code = (
        "from prunekit.cli import main; from prunekit.measure.memory import peak_rss\n"
        f"assert main({given!r}) == 0; print(peak_rss())"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = int(made.stdout.split()[-1])
    assert peak <= 700e6
