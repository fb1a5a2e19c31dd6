"""What measuring reports is consistent; how fast things are is for bench/, never for tests."""

import pytest
import torch

import prunekit as pk
from prunekit.errors import InputError
from prunekit.measure import (
    interleave,
    model_bytes,
    parameter_count,
    peak_memory,
    summarise,
    timing,
)
from prunekit.measure.comparison import bench_models
from prunekit.measure.provenance import provenance
from tests.models import tiny_model


def test_rounds_visit_every_case_in_turn():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleave(cases, 3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert [len(s) for s in seconds.values()] == [3, 3]
    assert all(s >= 0 for many in seconds.values() for s in many)


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [([9, 4, 4], 3), ([4, 4], 2), ([4, 9], 2), ([9, 8, 7], 3)],
)
def test_warming_up_ends_when_nothing_gets_faster(monkeypatch, seconds, rounds):
    now, taken = [0.0], iter(seconds)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.warm_up({"case": lambda: now.append(now.pop() + next(taken))}) == rounds
    assert list(taken) == []


def test_summary_is_median_and_quartiles():
    found = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert summarise([7.0]).low == 7.0


def test_bench_gives_a_row_a_model_test_and_batch(llama):
    models = {"dense": llama, "small": tiny_model("llama", intermediate_size=32)}
    rows = bench_models(models, prompt=8, generate=3, batch=(1, 2), rounds=2)
    assert [(r.model, r.test, r.batch) for r in rows] == [
        (model, test, batch)
        for batch in (1, 2)
        for test in ("pp8", "tg3")
        for model in ("dense", "small")
    ]
    for row in rows:
        assert row.low <= row.tokens_per_s <= row.high
        assert row.speedup == 1.0 or row.model == "small"


def test_decoding_does_the_same_work_every_time(llama):
    """The cache is cut back after each run: else positions would run out of the model's 64."""
    bench_models({"m": llama}, prompt=40, generate=20, rounds=4)


def test_sizes_count_tied_weights_once():
    tied = tiny_model("llama", tie_word_embeddings=True)
    untied = tiny_model("llama")
    assert parameter_count(untied) - parameter_count(tied) == 100 * 32
    assert model_bytes(untied) == 4 * parameter_count(untied)
    assert model_bytes(untied.to(torch.bfloat16)) == 2 * parameter_count(untied)


def test_peak_memory_sees_the_models_weights(tmp_path, llama):
    wide = tiny_model("llama", intermediate_size=60_000)
    folders = [pk.save(m, None, tmp_path / name) for m, name in ((llama, "s"), (wide, "w"))]
    small, large = (peak_memory(f, prompt=4, generate=1)["peak_bytes"] for f in folders)
    assert large - small > 0.8 * (model_bytes(wide) - model_bytes(llama))
    with pytest.raises(InputError, match="its memory could not be measured"):
        peak_memory(tmp_path / "missing")


def test_bench_through_the_front_door(llama):
    result = pk.bench(tiny_model("llama"), baseline=llama, prompt=4, generate=2, rounds=1)
    assert {row["model"] for row in result["rows"]} == {"dense", "pruned"}
    assert result["models"]["dense"]["parameters"] == parameter_count(llama)
    with pytest.raises(InputError, match="must be at least 1"):
        pk.bench(llama, generate=0)


def test_provenance_names_machine_and_versions():
    facts = provenance(seed=5)
    assert torch.__version__.startswith(facts["versions"]["torch"])
    assert facts["seed"] == 5
    assert facts["device"]
