"""The gate: what it says of ratios drawn at random, its file, and a run of it."""

import json
import random
import subprocess
import sys

import pytest
import torch

from prunekit.errors import InputError
from prunekit.integrations import plain_llama
from prunekit.integrations.plain_llama import Shape
from prunekit.measure import gate
from prunekit.measure.gate import OK, REGRESSED, UNDECIDED, decide, verdict
from tests.models import tiny_model


def machine(seed, slow_down=1.0, noise=0.03, spikes=0.1):
    """Ratios as a shared machine gives them: noise, and now and then another process."""
    draw = random.Random(seed)

    def more(rounds, tests=("tg",)):
        def once():
            busy = 1 + draw.random() if draw.random() < spikes else 1.0
            return slow_down * busy * draw.gauss(1.0, noise)

        return {test: [once() for _ in range(rounds)] for test in tests}

    return more


def quiet():
    """The share of waiting on a machine of one's own."""
    return 0.0


def steps():
    """A clock that goes on by a second each time it is read."""
    now = iter(range(10_000))
    return lambda: next(now)


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.08])
def test_an_unchanged_revision_raises_no_alarm(noise):
    for seed in range(200):
        before = machine(seed, noise=noise)(gate.ROUNDS)
        (found,) = decide(before, machine(seed + 1000, noise=noise), 0.05, 8, steps())
        assert found.verdict != REGRESSED


def test_a_tenth_slower_is_caught():
    caught = 0
    for seed in range(100):
        before = machine(seed)(3 * gate.ROUNDS)
        (found,) = decide(before, machine(seed + 1000, slow_down=1.10), 0.05, 20, steps(), quiet)
        caught += found.verdict == REGRESSED
        assert found.verdict != OK
    assert caught >= 95


def spells(*slow_downs):
    """A machine that is so much slower for as many rounds as are timed at once, and then again."""
    each = iter(slow_downs)

    def more(rounds, tests=("tg",)):
        return machine(1, slow_down=next(each), noise=0.002, spikes=0)(rounds, tests)

    return more


@pytest.mark.parametrize(
    ("slow_downs", "seconds", "said"),
    [
        ([1.2, 1.0, 1.0, 1.0, 1.0], 5, OK),
        ([1.2, 1.2, 1.0, 1.2, 1.0, 1.2], 6, UNDECIDED),  # slow for the most part, never for long
        ([1.2, 1.2, 1.2], 99, REGRESSED),
        ([1.2, 1.2, 1.2], 0, REGRESSED),  # an alarm is heard out when time is up
        ([1.2, 1.0, 1.0], 0, UNDECIDED),
        ([1.0, 1.0], 0, OK),
    ],
)
def test_an_alarm_has_to_last(slow_downs, seconds, said):
    before = machine(1, noise=0.002, spikes=0)(3 * gate.ROUNDS)
    (found,) = decide(before, spells(*slow_downs), 0.05, seconds, steps(), quiet)
    assert found.verdict == said


def test_what_waits_is_not_heard_out():
    before = machine(1, noise=0.002, spikes=0)(3 * gate.ROUNDS)
    (found,) = decide(before, spells(1.2), 0.05, 0, steps(), lambda: 0.3)
    assert found.verdict == UNDECIDED


def test_the_reference_is_a_llama_of_the_models_shape(monkeypatch):
    model = tiny_model("llama", intermediate_size=40)
    shape = Shape.of(model)
    assert shape == Shape(32, 40, 2, 4, 2, 8, 100)
    again = shape.build(model.device, torch.bfloat16)
    assert Shape.of(again) == shape
    assert again.dtype == torch.float32  # on a CPU
    monkeypatch.setattr(plain_llama, "_BYTES", 1)
    monkeypatch.setattr(plain_llama, "_VOCABULARY", 64)
    assert Shape.of(shape.build(model.device, model.dtype)) == Shape(32, 40, 1, 4, 2, 8, 64)


def test_every_architecture_finds_its_reference(architecture):
    shape = Shape.of(tiny_model(architecture))
    out = shape.build(torch.device("cpu"), torch.float32)(torch.arange(3)[None])
    assert out.logits.shape == (1, 3, shape.vocabulary)


@pytest.mark.parametrize("facts", [None, {"hidden": 8}, {**vars(Shape(*[1] * 7)), "width": -1}])
def test_a_baseline_held_against_nothing_is_refused(facts):
    with pytest.raises(InputError, match="save it anew"):
        Shape.read(facts)


def test_a_quiet_machine_says_ok_at_once():
    (found,) = decide(
        machine(1, noise=0.002, spikes=0)(11), machine(2, noise=0.002, spikes=0), 0.05, 8, steps()
    )
    assert found.verdict == OK
    assert abs(found.change) < 0.01
    assert found.low <= found.change <= found.high


def test_too_much_noise_is_not_decided():
    wild = {"noise": 0.3}
    (found,) = decide(machine(1, **wild)(11), machine(2, **wild), 0.05, 3, steps())
    assert found.verdict == UNDECIDED


def test_what_was_timed_while_others_had_the_processor_is_no_alarm():
    before, slower = machine(1)(33), machine(2, slow_down=1.3)
    (found,) = decide(before, slower, 0.05, 20, steps(), quiet)
    assert found.verdict == REGRESSED
    (found,) = decide(before, slower, 0.05, 20, steps(), lambda: 0.3)
    assert found.verdict == UNDECIDED
    (found,) = decide(before, machine(3), 0.05, 100, steps(), lambda: 0.3)
    assert found.verdict == OK


def test_waiting_is_seen_where_processes_share_a_processor():
    """Beside one that never rests, on the same processor: about half of the time."""
    alone = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    begun = "print('begun', flush=True)\nwhile True: pass"
    code = (
        "import time; from prunekit.measure.waiting import Waiting\n"
        "watch, until = Waiting(), time.monotonic() + 1\n"
        "while time.monotonic() < until: pass\n"
        "print(watch.share())"
    )
    command = [sys.executable, "-c"]
    other = subprocess.Popen([*command, f"{alone}\n{begun}"], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        found = subprocess.run([*command, f"{alone}\n{code}"], capture_output=True, check=True)
    finally:
        other.kill()
        other.communicate()
    assert 0.2 < float(found.stdout) < 1


def test_what_is_decided_is_not_timed_again():
    noises, asked = {"steady": 0.002, "wild": 0.3}, []

    def more(rounds, tests):
        asked.append(list(tests))
        known = {t: machine(len(asked), noise=noises[t], spikes=0) for t in tests}
        return {test: known[test](rounds, [test])[test] for test in tests}

    before = {test: machine(99, noise=n, spikes=0)(11)["tg"] for test, n in noises.items()}
    steady, wild = decide(before, more, 0.05, 4, steps())
    assert asked[0] == ["steady", "wild"]
    assert set(map(tuple, asked[1:])) == {("wild",)}
    assert steady.timings == gate.ROUNDS
    assert wild.timings == len(asked) * gate.ROUNDS > gate.ROUNDS


def test_a_ratio_is_to_the_reference_before_and_after():
    assert gate.ratio(1.0, 4.0, 3.0) == 2.0
    order = []
    cases = [lambda name=name: order.append(name) for name in "ab"]
    assert len(list(gate.between(cases, lambda: order.append("r")))) == 2
    assert order == list("rarbr")
    assert list(gate.between([], lambda: order.append("r"))) == []
    assert order == list("rarbr")


def test_the_interval_holds_the_true_ratio():
    held = 0
    for seed in range(300):
        before, now = (machine(s, f)(15)["tg"] for s, f in ((seed, 1.0), (seed + 5000, 1.2)))
        low, high = gate.interval(before, now, 0.95)
        held += low <= 1.2 <= high
    assert 0.92 * 300 <= held < 300


def test_few_rounds_raise_no_alarm():
    assert verdict("tg", [1.0] * 5, [2.0] * 5, 0.05).verdict == UNDECIDED
    assert verdict("tg", [1.0] * 11, [2.0] * 11, 0.05).verdict == REGRESSED


def test_ratios_of_a_model(llama, tmp_path):
    sizes = {"prompt": 8, "generate": 2, "batch": [1]}
    models = {"m": llama, "small": tiny_model("llama", intermediate_size=16)}
    names, more = gate.measured(models, **sizes)
    ratios = more(2, names)
    tests = "MLPs pp8", "MLPs tg8", "pp8", "tg2"
    assert sorted(ratios) == [f"{name} {test} batch 1" for name in models for test in tests]
    assert sorted(names) == sorted(ratios)
    for name, each in ratios.items():
        assert len(each) == (2 * gate.MLP_TIMES if "MLPs" in name else 2)
        assert min(each) > 0
    assert list(more(1, names[:1])) == names[:1]
    options = sizes | {"models": ["m"]}
    shape = Shape.of(llama)
    gate.save_baseline(tmp_path / "b.json", ratios, shape, options)
    assert gate.read_baseline(tmp_path / "b.json", options) == (ratios, shape)
    with pytest.raises(InputError, match="measured with prompt 8, not 9"):
        gate.read_baseline(tmp_path / "b.json", options | {"prompt": 9})
    (tmp_path / "other.json").write_text(json.dumps({"kind": "x"}))
    with pytest.raises(InputError, match="no baseline of this version"):
        gate.read_baseline(tmp_path / "other.json", options)
