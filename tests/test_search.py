"""Goals: the least sparsity that reaches them; search: the smallest model within a loss rise."""

import math

import pytest
import torch
from torch import nn

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.checkpoint import weight_bytes
from prunekit.corpus import from_texts
from prunekit.errors import InputError
from prunekit.experiment.goals import (
    SpeedBySparsity,
    measure_speed,
    parse_bytes,
    sparsities,
    sparsity_for_bytes,
)
from prunekit.experiment.search import QUICK, REAL, Step, hold_out, smallest
from tests.models import tiny_model


@pytest.mark.parametrize(
    ("text", "size"),
    [("123", 123), ("200MB", 200_000_000), ("1.5 GiB", 3 << 29), ("7kb", 7000), ("8B", 8)],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "200 apples", "-5MB", "1e9"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="expected a size such as 200MB"):
        parse_bytes(text)


def test_sparsities_are_those_at_which_a_width_changes():
    assert sparsities([64, 64], 16) == [0, 0.25, 0.5, 0.75]
    assert sparsities([40], 16) == pytest.approx([0, 0.2, 0.6])


@pytest.mark.parametrize("name", ["llama", "llama_bias", "phi3", "gpt2", "qwen2_moe"])
def test_a_model_pruned_for_its_bytes_fits_and_no_wider_one_would(tmp_path, name):
    dense = tiny_model(name)
    widths = [view.width for view in find_mlps(dense)]
    steps = sparsities(widths, 8)

    def saved(sparsity):
        model = tiny_model(name)
        plan = pk.plan([torch.zeros(w) for w in widths], sparsity, multiple_of=8)
        pk.prune(model, plan, compensate="none")
        return weight_bytes(pk.save(model, None, tmp_path / "m", force=True))

    middle = len(steps) // 2
    slack = 200 * len(list(dense.parameters()))  # by how much headers may be overestimated
    target = saved(steps[middle]) + slack
    found = sparsity_for_bytes(dense, target, multiple_of=8)
    assert saved(found) <= target
    wider = [s for s in steps[1:] if s < found]
    assert not wider or saved(wider[-1]) + slack > target


def test_bytes_out_of_reach_say_what_is_in_reach(llama):
    with pytest.raises(InputError, match=r"got 1000; expected at least [0-9]+"):
        sparsity_for_bytes(llama, 1000, multiple_of=16)
    with pytest.raises(InputError, match=r"the dense model has [0-9]+ already"):
        sparsity_for_bytes(llama, 10**9)


def test_the_least_sparsity_for_a_speedup_lies_on_the_measured_line():
    speed = SpeedBySparsity((0.0, 0.25, 0.5, 0.75), (1.0, 1.2, 1.1, 2.0))
    assert speed.at(0.125) == pytest.approx(1.1)
    assert speed.at(0.5) == 1.2  # a fall is noise
    steps = [k / 16 for k in range(16)]
    for target in (1.05, 1.2, 1.3, 2.0):
        found = speed.sparsity_for(target, steps)
        assert speed.at(found) >= target
        assert speed.at(found - 1 / 16) < target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (2.5, "got 2.5; expected at most 2.00, which is what removing 75% of the neurons gives"),
        (1.0, "expected more than 1"),
        (math.nan, "expected more than 1"),
    ],
)
def test_a_speedup_out_of_reach_is_refused(target, message):
    speed = SpeedBySparsity((0.0, 0.75), (1.0, 2.0))
    with pytest.raises(InputError, match=message):
        speed.sparsity_for(target, [0.0, 0.5, 0.75])


def test_speed_is_measured_at_widths_that_can_be_kept_and_leaves_the_model_alone(llama):
    before = [p.clone() for p in llama.parameters()]
    speed = measure_speed(llama, multiple_of=32, prompt=4, generate=2, rounds=1)
    assert speed.sparsity == pytest.approx((0, 1 / 3, 2 / 3))  # 50 % rounds to 64 of 96 again
    assert len(speed.speedup) == 3
    assert speed.speedup[0] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters(), strict=True))


@pytest.mark.parametrize("count", [1, 2, 7, 23])
def test_the_search_ends_where_a_fitting_model_lies_next_to_one_that_does_not(count):
    """Whatever the quick repair says, and it may be far off."""
    steps = [k / (count + 1) for k in range(1, count + 1)]
    for real_limit in range(count + 1):
        for quick_limit in range(count + 1):
            tried = []

            def trial(sparsity, repair, limits=(real_limit, quick_limit), tried=tried):
                tried.append((sparsity, repair))
                limit = limits[0] if repair == REAL else limits[1]
                return Step(repair, sparsity, 0.0, steps.index(sparsity) < limit)

            found = smallest(steps, trial)
            assert found == (steps[real_limit - 1] if real_limit else None)
            assert len(set(tried)) == len(tried)
            real = [s for s, repair in tried if repair == REAL]
            assert len(real) <= 2 + 2 * abs(real_limit - quick_limit)
            assert sum(repair == QUICK for _, repair in tried) <= count.bit_length()


def test_held_out_prompts_calibrate_nothing():
    rest, held_out = hold_out(from_texts([f"w{i}" for i in range(12)]))
    assert [e.text for e in held_out.examples] == ["w4", "w9"]
    assert {*rest.examples} | {*held_out.examples} == {
        *from_texts([f"w{i}" for i in range(12)]).examples
    }
    assert len(rest.examples) == 10
    with pytest.raises(InputError, match="got 9 prompts; a search needs at least 10"):
        hold_out(from_texts(["w1"] * 9))


def trained(model: nn.Module, tokenizer, texts) -> nn.Module:
    """A few steps, so that pruning has something to lose."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        for text in texts[:8]:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            if ids.shape[1] > 1:
                model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def test_search_finds_a_model_within_the_bound(llama, tokenizer, texts):
    model = trained(llama, tokenizer, texts)
    before = [p.clone() for p in model.parameters()]
    seen = []
    found = pk.search(
        model, tokenizer, texts, max_loss_rise=0.05, multiple_of=8, quiet=True, report=seen.append
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert tuple(seen) == found.path
    assert found.best.fits
    assert found.best.rise <= 0.05
    assert found.loss.loss == pytest.approx(found.dense_loss + found.best.rise)
    assert [v.width for v in find_mlps(found.model)] == found.plan.widths()
    _, held_out = hold_out(from_texts(texts))
    again = pk.evaluate(found.model, tokenizer, [held_out], quiet=True)["loss"][0]
    assert again["loss"] == pytest.approx(found.loss.loss)
    larger = [s for s in found.path if s.repair == REAL and s.sparsity > found.best.sparsity]
    assert all(not s.fits for s in larger)


def test_a_bound_that_is_none_is_refused(llama, tokenizer, texts):
    for bound in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="expected nats a token above 0"):
            pk.search(llama, tokenizer, texts, max_loss_rise=bound)
