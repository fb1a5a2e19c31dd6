"""A calibration that is stopped goes on from where it was, to the same statistics bit by bit."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import prunekit as pk
from prunekit import course as module
from prunekit.cli import main
from prunekit.course import Course, Stopped, signals_noted
from prunekit.errors import InputError
from prunekit.stats import NeuronStats
from tests.models import tiny_model
from tests.same import assert_same
from tests.vocabularies import byte_level

WAYS = {
    "plain": {},
    "gram": {"gram": True},
    "gradients": {"gram": True, "gradients": True},
    "everything": {"gram": True, "gradients": True, "taylor": True, "off_task": True},
}


@pytest.fixture
def stopped_after(monkeypatch):
    """Have a signal come while so many batches have been done, all classes counted."""

    def set_up(count, number=signal.SIGTERM):
        left = iter([False] * (count - 1) + [True])
        over = Course.over

        def interrupted(self, batches):
            for batch in over(self, batches):
                if next(left, False):
                    signal.raise_signal(number)
                yield batch

        monkeypatch.setattr(Course, "over", interrupted)

    return set_up


@pytest.mark.parametrize(
    ("name", "way", "count"),
    [
        *(("llama", way, count) for way in WAYS for count in (1, 9)),
        *(("mixtral", way, 3) for way in ("gradients", "everything")),
    ],
)
def test_it_goes_on_to_the_same(name, way, count, tokenizer, texts, tmp_path, stopped_after):
    model, file = tiny_model(name), tmp_path / "s.unfinished"
    both = {"distractors": [texts[3:]], "batch_tokens": 40, "quiet": True, **WAYS[way]}
    want = pk.calibrate(model, tokenizer, texts[:4], **both)
    stopped_after(count)
    with pytest.raises(Stopped, match="SIGTERM"):
        pk.calibrate(model, tokenizer, texts[:4], unfinished=file, **both)
    got = pk.calibrate(model, tokenizer, texts[:4], unfinished=file, resume=True, **both)
    assert_same(got, want)


def test_it_may_be_stopped_again_and_again(llama, tokenizer, texts, tmp_path, stopped_after):
    options = {"batch_tokens": 20, "gram": True, "quiet": True, "unfinished": tmp_path / "s"}
    want = pk.calibrate(llama, tokenizer, texts, batch_tokens=20, gram=True, quiet=True)
    stops = 0
    while True:
        stopped_after(2)
        try:
            got = pk.calibrate(llama, tokenizer, texts, resume=True, **options)
            break
        except Stopped:
            stops += 1
    assert stops > 2
    assert_same(got, want)


def test_where_nothing_was_kept_it_begins(llama, tokenizer, texts, tmp_path):
    got = pk.calibrate(
        llama, tokenizer, texts, unfinished=tmp_path / "none", resume=True, quiet=True
    )
    assert_same(got, pk.calibrate(llama, tokenizer, texts, quiet=True))


@pytest.mark.parametrize(
    "other", [{"gram": True}, {"batch_tokens": 41}, {"max_length": 9}, {"off_task": True}]
)
def test_what_another_calibration_left_is_refused(
    llama, tokenizer, texts, tmp_path, stopped_after, other
):
    options = {"batch_tokens": 40, "quiet": True, "unfinished": tmp_path / "s"}
    stopped_after(1)
    with pytest.raises(Stopped):
        pk.calibrate(llama, tokenizer, texts, **options)
    with pytest.raises(InputError, match="another model, corpora or options"):
        pk.calibrate(llama, tokenizer, texts, resume=True, **(options | other))
    with pytest.raises(InputError, match="another model, corpora or options"):
        pk.calibrate(llama, tokenizer, texts[1:], resume=True, **options)
    with torch.no_grad():
        llama.model.layers[0].mlp.gate_proj.weight.mul_(2)
    with pytest.raises(InputError, match="another model, corpora or options"):
        pk.calibrate(llama, tokenizer, texts, resume=True, **options)


@pytest.mark.parametrize(
    "state",
    [None, {}, {"key": 1, "class": "target", "done": 1}, {"key": "", "class": "t", "done": 1}],
)
def test_a_broken_file_is_refused(llama, tokenizer, texts, tmp_path, state):
    options = {"unfinished": tmp_path / "s", "resume": True, "quiet": True}
    stats = pk.calibrate(llama, tokenizer, texts, quiet=True)
    stats.provenance["unfinished"] = state
    stats.save(tmp_path / "s", finished=False)
    with pytest.raises(InputError, match=r"unfinished|another model"):
        pk.calibrate(llama, tokenizer, texts, **options)


def test_what_is_unfinished_is_no_statistics_and_they_are_not_unfinished(
    llama, tokenizer, texts, tmp_path, stopped_after
):
    file = tmp_path / "s"
    pk.calibrate(llama, tokenizer, texts, quiet=True).save(tmp_path / "whole")
    stopped_after(1)
    with pytest.raises(Stopped):
        pk.calibrate(llama, tokenizer, texts, batch_tokens=40, unfinished=file, quiet=True)
    with pytest.raises(InputError, match="is unfinished neuron-stats version 1"):
        NeuronStats.load(file)
    with pytest.raises(InputError, match="expected unfinished neuron-stats"):
        pk.calibrate(
            llama, tokenizer, texts, unfinished=tmp_path / "whole", resume=True, quiet=True
        )


def test_what_was_done_is_kept_from_time_to_time(monkeypatch):
    kept = []
    monkeypatch.setattr(module, "KEEP_S", 0.0)
    monkeypatch.setattr(module, "KEEP_SHARE", float("inf"))
    assert list(Course(1, kept.append).over("abcd")) == list("bcd")
    assert kept == [2, 3, 4]
    monkeypatch.setattr(module, "KEEP_S", 1000.0)
    list(Course(0, kept.append).over("abcd"))
    assert kept == [2, 3, 4]


def test_keeping_takes_a_small_part_of_the_time(monkeypatch):
    """A clock by which a batch takes a second, and keeping ten."""
    now, kept = [0.0], []

    def keep(done):
        kept.append(done)
        now[0] += 10

    monkeypatch.setattr(module, "KEEP_S", 5.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for _ in Course(0, keep).over(range(1000)):
        now[0] += 1
    assert kept[:2] == [5, 205]  # 10 s are a twentieth of 200
    assert len(kept) == 5


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a person's Python has it: what runs tests may have set it aside."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_as_ever_and_all_do_afterwards(ctrl_c):
    with pytest.raises(KeyboardInterrupt), signals_noted() as came:
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def corpus(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def started(*arguments):
    command = [sys.executable, "-m", "prunekit", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def job(tmp_path, texts):
    """A calibration of a second or some: a prompt a batch, hundreds of them."""
    model = tiny_model("llama", vocab_size=400)
    folder = pk.save(model, byte_level("qwen2", 400), tmp_path / "model")
    data = corpus(tmp_path / "t.jsonl", [f"{i} {text}" for i in range(6) for text in texts])
    options = ("--target", data, "--gram", "--gradients", "--taylor", "--quiet")
    return ("calibrate", folder, *options)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_the_verb_is_stopped_and_goes_on(job, tmp_path, number):
    file = tmp_path / "s.stats"
    assert main([*map(str, job), "-o", str(tmp_path / "want")]) == 0
    process = started(*job, "-o", file)
    while process.poll() is None and not _catches(process.pid):
        time.sleep(0.005)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 128 + number, error
    assert error.count("\n") == 1
    assert "--resume goes on" in error
    assert not file.exists()
    assert main([*map(str, job), "-o", str(file), "--resume"]) == 0
    assert_same(NeuronStats.load(file), NeuronStats.load(tmp_path / "want"))
    assert not (tmp_path / "s.stats.unfinished").exists()


def _catches(pid):
    """Whether a process has a handler of its own for SIGTERM, which only a calibration sets."""
    with open(f"/proc/{pid}/status") as file:
        (caught,) = [line.split()[1] for line in file if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_the_processes_of_torchrun_keep_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["calibrate", "m", "--target", "t", "-o", str(tmp_path / "s"), "--resume"]
    assert main(arguments) == 2
    assert "--resume: only one process" in capsys.readouterr().err


_EAGER = (
    "import sys; from prunekit import course; course.KEEP_S, course.KEEP_SHARE = 0.0, 1e9; "
    "from prunekit.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same(job, tmp_path):
    """Ten times in a row, each a kill -9 while every batch is kept; then it is let go on."""
    file, kept, draw = tmp_path / "s.stats", tmp_path / "s.stats.unfinished", random.Random(5)
    assert main([*map(str, job), "-o", str(tmp_path / "want")]) == 0
    command = [sys.executable, "-c", _EAGER, *map(str, job), "-o", file, "--resume"]
    done = []
    for _ in range(10):
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and not (kept.exists() and kept.stat().st_mtime_ns > before):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert not file.exists()
        done.append(NeuronStats.load(kept, finished=False).provenance["unfinished"]["done"])
    assert done == sorted(set(done))  # each went further than the one before
    assert main([*map(str, job), "-o", str(file), "--resume"]) == 0
    assert_same(NeuronStats.load(file), NeuronStats.load(tmp_path / "want"))
    assert {path.name for path in tmp_path.iterdir()} >= {"model", "t.jsonl", "want", "s.stats"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".s.stats")]
