"""`prunekit recover` end to end: what it writes, keeps of a pruning, and refuses."""

import json
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunekit as pk
from prunekit.recover.trainer import Recovery
from tests.models import tiny_model
from tests.test_cli import corpus, refused, run
from tests.test_ranks import torchrun

__all__ = ["corpus"]  # a fixture

QUICK = ("--steps", 4, "--learning-rate", 0.01, "--dtype", "fp32", "--quiet")


@pytest.fixture(scope="module")
def small(tmp_path_factory, folder):
    """The tiny Llama without half of its neurons."""
    out = tmp_path_factory.mktemp("pruned") / "small"
    model = pk.load(folder)
    plan = pk.plan(pk.score(None, model, "magnitude_l2"), 0.5, multiple_of=16)
    pk.save(pk.prune(model, plan), pk_tokenizer(folder), out)
    return out


def pk_tokenizer(folder):
    from prunekit.integrations.loading import load_tokenizer

    return load_tokenizer(folder)


@pytest.mark.parametrize("method", ["lora", "full", "distill"])
def test_a_pruned_checkpoint_comes_back_as_one(method, capsys, tmp_path, folder, small, corpus):
    out = tmp_path / "out"
    given = ("--method", method, *(("--teacher", folder) if method == "distill" else ()))
    status, text, err = run(capsys, "recover", small, "--data", corpus, *given, *QUICK, "-o", out)
    assert status == 0, err
    assert f"{method}: 87 examples" in text
    assert f"saved {out}: loads with transformers'" in text
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size == 48
    record, before = (json.loads((p / "prunekit.json").read_text()) for p in (out, small))
    changed = ("bytes", "parameters", "sha256")
    assert {k: record[k] for k in before if k not in changed} == {
        k: before[k] for k in before if k not in changed
    }
    assert run(capsys, "inspect", out, "--verify")[0] == 0
    assert record["parameters"] == before["parameters"]
    facts = record["recovery"]
    assert facts["base"] == str(small)
    assert facts["settings"]["method"] == method
    assert facts["teacher"] == (str(folder) if method == "distill" else None)
    assert facts["loss"]["after"] < facts["loss"]["before"] or method == "distill"
    curve = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [1, 2, 3, 4]
    assert "training followed" in (out / "README.md").read_text()
    assert pk.PrunePlan.load(out / "plan.safetensors").widths() == [48, 48]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert run(capsys, "inspect", out)[0] == 0


def test_an_adapter_can_be_kept_beside(capsys, tmp_path, folder, corpus):
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    given = ("--data", corpus, "--keep-adapter", "--rank", 4, *QUICK, "-o", out)
    assert run(capsys, "recover", folder, *given)[0] == 0
    merged = peft.PeftModel.from_pretrained(pk.load(folder), out / "adapter").merge_and_unload()
    saved = load_file(out / "model.safetensors")
    for name, tensor in merged.state_dict().items():
        if name in saved:
            assert (saved[name] - tensor).abs().max() < 1e-5
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(folder))


def test_what_was_stopped_is_resumed_or_begun_anew(capsys, monkeypatch, tmp_path, folder, corpus):
    step = Recovery.training_step

    def until_the_third(self, *rest):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *rest)

    given = ("recover", folder, "--data", corpus, "--method", "full", *QUICK, "--save-every", 2)
    assert run(capsys, *given, "-o", tmp_path / "a")[0] == 0
    monkeypatch.setattr(Recovery, "training_step", until_the_third)
    assert run(capsys, *given, "-o", tmp_path / "b")[0] == 130
    assert (tmp_path / "b.training" / "checkpoint-2").is_dir()
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(Recovery, "training_step", step)
    assert "b.training: holds a run already" in refused(capsys, *given, "-o", tmp_path / "b")
    shutil.copytree(tmp_path / "b.training", tmp_path / "c.training")
    assert run(capsys, *given, "-o", tmp_path / "b", "--resume")[0] == 0
    assert run(capsys, *given, "-o", tmp_path / "c", "--force")[0] == 0
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b == c
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_after_its_step_and_resuming_gives_the_same(
    capsys, monkeypatch, tmp_path, folder, corpus, number
):
    step = Recovery.training_step

    def interrupted(self, *rest):
        if self.state.global_step == 2:
            signal.raise_signal(number)
        return step(self, *rest)

    given = ("recover", folder, "--data", corpus, "--method", "full", *QUICK)
    assert run(capsys, *given, "-o", tmp_path / "a")[0] == 0
    monkeypatch.setattr(Recovery, "training_step", interrupted)
    status, _, error = run(capsys, *given, "-o", tmp_path / "b")
    assert status == 128 + number
    kept = re.fullmatch(
        rf"prunekit recover: {number.name}: step 3 of \d+ was done .*goes on\n", error
    )
    assert kept, error
    assert (tmp_path / "b.training" / "checkpoint-3").is_dir()
    monkeypatch.setattr(Recovery, "training_step", step)
    assert run(capsys, *given, "-o", tmp_path / "b", "--resume")[0] == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_arithmetic_is_made_on_the_spot(capsys, tmp_path, folder):
    given = ("--task", "arithmetic", "--examples", 128, *QUICK, "--json")
    status, text, err = run(capsys, "recover", folder, *given, "-o", tmp_path / "out")
    assert status == 0, err
    facts = json.loads(text)
    assert facts["settings"]["method"] == "full"
    assert facts["data"]["examples"] == 128
    assert facts["loss"]["held_out"] is True
    assert len(facts["curve"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("MODEL -o OUT", "needs --data FILE or --task NAME, and -o OUT"),
        ("MODEL --data CORPUS", "needs --data FILE or --task NAME, and -o OUT"),
        ("MODEL --data CORPUS --task arithmetic -o OUT", "needs --data FILE or --task NAME"),
        ("MODEL --data CORPUS --preset paper -o OUT", "preset: got 'paper'; expected one of"),
        ("MODEL --data CORPUS --method distill -o OUT", "--method distill: needs --teacher DENSE"),
        ("MODEL --data CORPUS --teacher MODEL -o OUT", "--teacher: method lora takes none"),
        (
            "MODEL --data CORPUS --method distill --teacher OTHER -o OUT",
            "its vocabulary is not that of",
        ),
        ("MODEL --data EMPTY -o OUT", "the corpus is empty"),
        ("MODEL --data CORPUS --rank 0 -o OUT", "rank: got 0; expected more than 0"),
        ("MODEL --data CORPUS --max-length 1 -o OUT", "no example has a token to learn within 1"),
        ("MODEL --data CORPUS -o MODEL", "exists and is not empty"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, folder, corpus, arguments, message):
    places = {"MODEL": folder, "CORPUS": corpus, "OUT": tmp_path / "out"}
    places |= {"EMPTY": tmp_path / "empty.jsonl", "OTHER": tmp_path / "other"}
    places["EMPTY"].write_text("")
    tiny_model("llama").save_pretrained(places["OTHER"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (places["OTHER"] / name).write_text(text.replace('"w7"', '"seven"'))
    given = (places.get(word, word) for word in arguments.split())
    assert message in refused(capsys, "recover", *given, "--quiet")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_that_accumulates(capsys, tmp_path, folder, corpus):
    """The loss and gradient of every step, and the way that the weights went."""
    given = ("--data", corpus, "--method", "full", *QUICK, "--batch", 4)
    one, two = tmp_path / "one", tmp_path / "two"
    status, _, err = run(capsys, "recover", folder, *given, "--accumulation", 2, "-o", one)
    assert status == 0, err
    # What `accelerate launch` starts where it finds GPUs; on a CPU it starts one process alone.
    made = torchrun(2, "recover", folder, *given, "-o", two)
    assert made.returncode == 0, made.stderr
    curves = [
        [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    for mine, other in zip(*curves, strict=True):
        for key, value in mine.items():
            assert other[key] == pytest.approx(value, rel=1e-4), key
    dense, *after = (load_file(p / "model.safetensors") for p in (folder, one, two))
    moved, apart = (
        torch.cat([(a[name] - b[name]).flatten() for name in dense])
        for a, b in ((after[0], dense), (after[1], after[0]))
    )
    # Of a gradient that is noise Adam makes a whole step, so that single weights may go anywhere.
    assert apart.norm() < 0.01 * moved.norm()
