"""Processes that torchrun starts share a calibration, and find what one process finds."""

import json
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch

import prunekit as pk
from prunekit.stats import NeuronStats
from tests.models import tiny_model
from tests.vocabularies import byte_level

pytestmark = pytest.mark.skipif("not torch.distributed.is_available()", reason="no distribution")
OPTIONS = ("--gram", "--gradients", "--taylor", "--batch-tokens", "40", "--quiet")


def command(count, *arguments):
    given = ["-m", "torch.distributed.run", "--nproc-per-node", count, "-m", "prunekit", *arguments]
    return [sys.executable, *map(str, given)]


def torchrun(count, *arguments):
    return subprocess.run(command(count, *arguments), capture_output=True, text=True)


def model():
    return tiny_model("llama", vocab_size=400)


@pytest.fixture
def folder(tmp_path):
    return pk.save(model(), byte_level("qwen2", 400), tmp_path / "model")


def corpus(path, texts, rows):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in (list(texts) * rows)[:rows]))
    return path


def alike(one, other):
    """Within 1e-6 relative to the largest of each statistic."""
    for mine, theirs in zip(one.target, other.target, strict=True):
        assert (mine.prompts, mine.tokens) == (theirs.prompts, theirs.tokens)
        for name in vars(mine):
            a, b = getattr(mine, name), getattr(theirs, name)
            if isinstance(a, torch.Tensor):
                assert (a - b).abs().max() <= 1e-6 * b.abs().max(), name
    for a, b in zip(one.gradient_squares, other.gradient_squares, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_they_find_what_one_process_finds(count, folder, texts, tmp_path):
    data = corpus(tmp_path / "t.jsonl", texts, 7)
    for number, path in ((1, "one"), (count, "many")):
        made = torchrun(
            number, "calibrate", folder, "--target", data, *OPTIONS, "-o", tmp_path / path
        )
        assert made.returncode == 0, made.stderr
        assert made.stdout.count("saved ") == 1
    one, many = (NeuronStats.load(tmp_path / name) for name in ("one", "many"))
    alike(many, one)
    assert many.prompts == one.prompts
    plans = [pk.plan(pk.score(stats, model()), 0.5, multiple_of=8) for stats in (one, many)]
    assert all(torch.equal(a, b) for a, b in zip(*(p.kept for p in plans), strict=True))


@pytest.mark.slow
def test_a_process_may_have_nothing_to_do(folder, texts, tmp_path):
    data = corpus(tmp_path / "t.jsonl", texts, 1)
    for count in (1, 3):
        made = torchrun(
            count, "calibrate", folder, "--target", data, *OPTIONS, "-o", tmp_path / f"{count}"
        )
        assert made.returncode == 0, made.stderr
    alike(*(NeuronStats.load(tmp_path / name) for name in "31"))


def test_verbs_that_share_nothing_refuse_many_processes(capsys, monkeypatch, folder, tmp_path):
    from prunekit.cli import main

    monkeypatch.setenv("WORLD_SIZE", "4")
    given = ["prune", str(folder), "--strategy", "random", "--sparsity", "0.5"]
    assert main([*given, "-o", str(tmp_path / "out")]) == 2
    assert "torchrun started 4 processes; calibrate and recover share" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_its_reason(folder, texts, tmp_path):
    """The others wait for what it would have added, and do not wait for ever."""
    data = corpus(tmp_path / "t.jsonl", texts, 7)
    code = (
        "import os, sys\n"
        "from prunekit.cli import main\n"
        "from prunekit.errors import InputError\n"
        "import prunekit.cli.calibrate as verb\n"
        "if os.environ['RANK'] == '1':\n"
        "    def fails(*given, **named): raise InputError('the second one fails')\n"
        "    verb.calibrate = fails\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "run.py").write_text(code)
    started = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "run.py")]
    given = ["calibrate", str(folder), "--target", str(data), "-o", str(tmp_path / "out")]
    made = subprocess.run(
        [sys.executable, *started, *given], capture_output=True, text=True, timeout=240
    )
    assert made.returncode != 0
    assert "prunekit calibrate: the second one fails" in made.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_no_file_or_a_whole_one(folder, texts, tmp_path):
    """Ten runs of two processes, one of which gets a kill -9; then a run that is let be."""
    data = corpus(tmp_path / "t.jsonl", texts, 60)
    given = "calibrate", folder, "--target", data, *OPTIONS, "-o"
    assert torchrun(2, *given, tmp_path / "want").returncode == 0
    want, draw, killed = NeuronStats.load(tmp_path / "want"), random.Random(6), 0
    for trial in range(10):
        out = tmp_path / f"out{trial}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command(2, *given, out), **quiet)
        while process.poll() is None and len(psutil.Process(process.pid).children()) < 2:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 10))
        everyone = psutil.Process(process.pid).children() if process.poll() is None else []
        if everyone:
            draw.choice(everyone).kill()
            killed += 1
        status = process.wait(timeout=240)
        assert psutil.wait_procs(everyone, timeout=30)[1] == []
        assert not list(tmp_path.glob(".*"))  # nothing begun and left
        assert out.exists() or status != 0
        if not out.exists():
            assert torchrun(2, *given, out).returncode == 0
        alike(NeuronStats.load(out), want)
    assert killed >= 7
