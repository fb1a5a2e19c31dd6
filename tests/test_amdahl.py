"""The bound on a speed-up: Amdahl's law over measured parts, and the words that go with it."""

from dataclasses import asdict

import pytest
import torch

import prunekit as pk
from prunekit.measure import parts
from prunekit.measure.amdahl import bounds, explain, mlp_weights
from prunekit.measure.comparison import bench_models
from prunekit.measure.parts import PARTS, Parts, measure_parts, parts_of
from prunekit.measure.throughput import prefill_case
from prunekit.measure.timing import confidence
from tests.models import tiny_model

DENSE = Parts(mlp=6.0, attention=2.0, head=1.0, rest=1.0)


def test_half_of_six_tenths():
    found = explain(DENSE, Parts(3.0, 2.0, 1.0, 1.0), kept=0.5, measured=10 / 7, unaligned=None)
    assert found.speedup == pytest.approx(10 / 7)
    assert found.reached == pytest.approx(1.0)
    assert found.why == (
        "the MLPs take 60% of the dense model's time; 50% of their weights less can make it 1.43 × "
        "as fast, and 1.43 × was measured; the most that is left is attention"
    )


def test_mlps_that_do_not_get_faster_with_their_width():
    slow = Parts(5.4, 2.0, 1.0, 1.0)
    why = explain(DENSE, slow, kept=0.5, measured=10 / 9.4, unaligned=1021).why
    assert "the pruned MLPs take 1.80 times what their weights should" in why
    assert why.endswith("a width of 1021 is no multiple of 32")
    assert "multiple" not in explain(DENSE, slow, kept=0.5, measured=1.06, unaligned=None).why


def test_another_part_that_got_slower_and_a_loss():
    slow = Parts(3.0, 8.0, 1.0, 1.0)
    why = explain(DENSE, slow, kept=0.5, measured=10 / 13, unaligned=None).why
    assert "pruning did not pay" in why
    assert why.endswith("attention took 4.00 times as long as in the dense model")


def test_parts_that_took_no_time_at_all():
    """As where a run without its MLPs happened to take longer than the whole."""
    none, some = Parts(0.0, 0.0, 0.0, 1.0), Parts(1.0, 1.0, 0.0, 1.0)
    for pruned in (none, some):
        found = explain(none, pruned, kept=0.5, measured=0.5, unaligned=None)
        assert found.speedup == 1.0
        assert "pruning did not pay" in found.why


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "phi3"])
def test_every_layer_has_its_parts(name):
    model = tiny_model(name)
    found = parts_of(model)
    layers = model.config.num_hidden_layers
    assert len(found["attention"]) == layers
    assert len(found["mlp"]) in (layers, 2 * layers)  # OPT's projections lie in the layer itself
    assert len(found["head"]) == 1
    inside = [m for many in found.values() for each in many for m in each.modules()]
    assert len(inside) == len(set(map(id, inside)))  # nothing is counted twice


def test_what_a_part_takes_is_counted_as_its_own(llama, monkeypatch):
    """By a clock that goes on only inside the modules of one part, a second in each."""
    now = [0.0]
    monkeypatch.setattr(parts.time, "perf_counter", lambda: now[0])
    run = prefill_case(llama, 1, 8)
    for part, modules in parts_of(llama).items():
        hooks = [m.register_forward_hook(lambda *_: now.append(now.pop() + 1.0)) for m in modules]
        found = measure_parts(llama, run, rounds=2)
        for hook in hooks:
            hook.remove()
        assert asdict(found) == {**dict.fromkeys(PARTS, 0.0), part: float(len(modules))}


def test_no_hook_is_left(llama):
    measure_parts(llama, prefill_case(llama, 1, 4), rounds=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_weights_count_once_and_bounds_take_them(llama):
    small = tiny_model("llama", intermediate_size=32)
    kept = mlp_weights(small) / mlp_weights(llama)
    assert kept == 32 / llama.config.intermediate_size
    found = bounds(llama, small, (DENSE, Parts(3.0, 2.0, 1.0, 1.0)), 1.2)
    assert found.speedup == pytest.approx(10 / (10 - 6 * (1 - kept)))


def test_rows_are_explained_where_the_layers_are_the_same(llama):
    models = {"dense": llama, "small": tiny_model("llama", intermediate_size=32)}
    models["deep"] = tiny_model("llama", num_hidden_layers=3)
    rows = bench_models(models, prompt=8, generate=2, rounds=1, explain=True)
    for row in rows:
        assert (row.bound is not None) == (row.model == "small")
        if row.bound is not None:
            assert row.bound.speedup > 1
            assert row.bound.reached == pytest.approx(row.speedup / row.bound.speedup)


def test_the_drop_in_module_has_parts_too(llama):
    compact = pk.compact_modules(tiny_model("llama"))
    assert len(parts_of(compact)["mlp"]) == llama.config.num_hidden_layers


def test_confidence_is_what_order_statistics_give():
    assert confidence([3.0]) == (3.0, 3.0)
    assert confidence([5.0, 1.0, 3.0, 2.0, 4.0]) == (1.0, 5.0)
    assert confidence(list(range(1, 11))) == (2, 9)  # 0.979; the next, 3 to 8, has 0.891
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        values = torch.randn(25, generator=generator).exp().tolist()
        low, high = confidence(values)
        held += low <= 1.0 <= high  # the median of a log-normal
    assert held >= 0.93 * 400
