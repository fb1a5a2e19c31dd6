"""Which widths run well: what is measured, what is said of it, and who asks."""

import json

import pytest
import torch

from prunekit.arch import find_mlps
from prunekit.cli import main
from prunekit.errors import InputError
from prunekit.measure import widths
from prunekit.measure.widths import anchors_of, measure_widths
from tests.models import TINY, tiny_model


@pytest.fixture(autouse=True)
def _a_small_pool(monkeypatch):
    monkeypatch.setattr(widths, "_POOL", {"cpu": 1 << 20})


def timed_by(seconds):
    """An `interleave` that runs every case once, and says what a function of its width says."""

    def interleave(cases, rounds, warmup):
        for case in cases.values():
            case()
        return {(count, width): [seconds(count, width)] * rounds for count, width in cases}

    return interleave


def wide(name="llama"):
    return find_mlps(tiny_model(name, **{TINY[name][2]: 1024}))[0]


@pytest.mark.parametrize(
    ("width", "want"),
    [(1536, [512, 768, 1280, 1536]), (512, [256, 512]), (8960, [2816, 4864, 6912, 8960])],
)
def test_anchors_lie_on_the_grid_up_to_the_dense_width(width, want):
    assert anchors_of(width) == want


def test_a_narrow_mlp_is_one_line():
    with pytest.raises(InputError, match="got an MLP of 511 neurons; expected at least 512"):
        anchors_of(511)


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_cliff_is_found_where_it_is(kind, compact, monkeypatch):
    """Times that grow with the width; a prefill's by half more where no multiple of 32 is."""

    def seconds(count, width):
        return (1e-4 + 1e-6 * width) * (1.5 if width % 32 and count > 1 else 1.0)

    monkeypatch.setattr(widths, "interleave", timed_by(seconds))
    found = measure_widths(wide(kind), rounds=7, compact=compact)
    assert found.advice == 32
    assert [each.multiple for each in found.alignments] == [1, 2, 4, 8, 16, 32, 64, 128]
    for each in found.alignments:
        for width in each.widths:
            assert width % each.multiple == 0
            assert width % (2 * each.multiple) != 0
        assert each.excess[1] == pytest.approx(0.0, abs=1e-9)
        assert each.excess[256] == pytest.approx(0.5 if each.multiple < 32 else 0.0, abs=1e-9)


def test_noise_is_no_cliff(monkeypatch):
    """Half of the rounds beside the grid take half as long again, the others half as long."""

    def noisy(cases, rounds, warmup):
        times = {key: 1e-6 * key[0] * key[1] for key in cases}
        swing = [1.5 if i % 2 else 0.5 for i in range(rounds)]
        return {key: [t * s if key[1] % 256 else t for s in swing] for key, t in times.items()}

    monkeypatch.setattr(widths, "interleave", noisy)
    found = measure_widths(wide(), rounds=9)
    assert found.advice == 1
    assert all(not each.cliffs for each in found.alignments)


def test_without_a_cliff_every_width_will_do(monkeypatch):
    monkeypatch.setattr(widths, "interleave", timed_by(lambda count, width: count * width * 1e-6))
    assert measure_widths(wide(), rounds=3).advice == 1


def test_a_cliff_at_the_grid_itself_is_no_riddle(monkeypatch):
    slow = timed_by(lambda count, width: width * (2e-6 if width % 256 else 1e-6))
    monkeypatch.setattr(widths, "interleave", slow)
    assert measure_widths(wide(), rounds=3).advice == widths.GRID


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_both_ways_compute_the_mlp(name):
    view = wide(name)
    torch.manual_seed(3)
    part = torch.randn(widths._numbers(view, 320)) / 8
    weights = widths._weights(view, part, 320)
    x = torch.randn(5, view.down.shape[0])
    plain, compact = widths._plain(x, *weights, view), widths._compact(x, *weights, view)
    torch.testing.assert_close(plain, compact, rtol=1e-4, atol=1e-4)
    assert plain.shape == x.shape


def test_experts_are_refused():
    view = find_mlps(tiny_model("mixtral"))[0]
    with pytest.raises(InputError, match="is of experts"):
        measure_widths(view)


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_model("llama", intermediate_size=1024).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_verb_says_what_to_round_to(folder, monkeypatch, capsys):
    slower = {1: 1.4, 256: 1.2}
    cliff = timed_by(lambda count, width: 1e-6 * width * (slower[count] if width % 8 else 1))
    monkeypatch.setattr(widths, "interleave", cliff)
    assert main(["bench", folder, "--widths"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "multiples of 8 cost what their neurons do, within 5%" in said
    assert "cost 40% more in decoding" in said
    assert main(["bench", folder, "--widths", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["multiple_of"] == 8
    assert {"seconds", "alignments", "provenance"} <= set(facts)


@pytest.mark.parametrize(("asked", "want"), [("auto", 8), ("128", 128)])
def test_prune_rounds_to_what_was_measured(asked, want, folder, monkeypatch, capsys):
    cliff = timed_by(lambda count, width: width * (1.4e-6 if width % 8 else 1e-6))
    monkeypatch.setattr(widths, "interleave", cliff)
    options = ["--strategy", "random", "--sparsity", "0.3", "--dry-run", "--json"]
    assert main(["prune", folder, "--multiple-of", asked, *options]) == 0
    kept = json.loads(capsys.readouterr().out)["widths"][0]
    assert kept == want * round(0.7 * 1024 / want)


@pytest.mark.parametrize("verb", ["prune", "search"])
@pytest.mark.parametrize("wrong", ["0", "wide"])
def test_what_is_no_multiple_is_one_line(verb, wrong, folder, capsys):
    given = [verb, folder, "--target", "x.jsonl", "-o", f"{folder}-small"]
    given += ["--sparsity", "0.3"] if verb == "prune" else ["--max-loss-rise", "0.1"]
    try:
        status = main([*given, "--multiple-of", wrong])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1
