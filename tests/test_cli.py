"""The command line end to end: what it prints, what it writes, and one clear line for bad input."""

import csv
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.cli import VERBS, main
from prunekit.cli.output import Output
from prunekit.integrations.loading import load_tokenizer
from prunekit.measure import gate, timing
from prunekit.ops.gated_mlp_cpu import decodes
from prunekit.ops.registry import OPERATIONS, force_backend
from tests.models import logits, tiny_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "task.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 5}"} for i in range(3, 90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    """Exit status, standard output, standard error; what fixtures printed before is left out."""
    capsys.readouterr()
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *arguments):
    """The one line that a refusal prints."""
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_the_whole_way_by_stats(capsys, tmp_path, folder, corpus):
    stats, out = tmp_path / "task.stats", tmp_path / "out"
    arguments = ("--target", corpus, "--distractor", corpus, "--gram", "--quiet", "-o", stats)
    status, text, _ = run(capsys, "calibrate", folder, *arguments)
    assert status == 0
    assert "target" in text
    assert str(stats) in text
    options = ("--stats", stats, "--sparsity", 0.3, "--multiple-of", 16, "--json")
    status, text, _ = run(capsys, "prune", folder, *options, "-o", out)
    facts = json.loads(text)
    assert status == 0
    assert facts["widths"] == [64, 64]
    assert facts["compensate"] == "sequential"
    assert facts["parameters"] < facts["parameters_dense"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size == 64
    status, text, _ = run(
        capsys, "eval", out, "--data", corpus, "--quiet", "--json", "--samples", 1
    )
    result = json.loads(text)
    assert result["loss"][0]["tokens"] == 2 * 87
    assert len(result["samples"]) == 1
    for path, kind in (
        (stats, "neuron-stats"),
        (out, "model"),
        (out / "plan.safetensors", "prune-plan"),
    ):
        status, text, _ = run(capsys, "inspect", path, "--json")
        assert json.loads(text)["kind"] == kind
        assert run(capsys, "inspect", path)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "task.stats"]


def test_prune_from_the_target_alone_repairs_by_default(capsys, tmp_path, folder, corpus):
    options = ("--sparsity", 0.3, "--multiple-of", 16, "-o", tmp_path / "out", "--quiet")
    status, text, _ = run(capsys, "prune", folder, "--target", corpus, *options)
    assert status == 0
    assert "64 of 96 neurons a layer (33.33% removed, 30.00% asked for); repair: sequential" in text


def test_gradients_are_gathered_when_asked_for_or_needed(capsys, tmp_path, folder, corpus):
    stats, options = tmp_path / "s", ("--sparsity", 0.3, "--multiple-of", 16, "--quiet")
    arguments = ("--target", corpus, "--taylor", "--quiet", "-o", stats)
    status, text, _ = run(capsys, "calibrate", folder, *arguments)
    assert status == 0
    assert "loss gradients: " in text
    assert json.loads(run(capsys, "inspect", stats, "--json")[1])["gradients"] is True
    given = ("--criterion", "taylor", "--compensate", "none", *options)
    assert run(capsys, "prune", folder, "--stats", stats, *given, "-o", tmp_path / "a")[0] == 0
    assert run(capsys, "prune", folder, "--target", corpus, *given, "-o", tmp_path / "b")[0] == 0
    one, two = (pk.PrunePlan.load(tmp_path / n / "plan.safetensors").kept for n in "ab")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    needs = ("--criterion", "reconstruction_fisher", *options, "-o", tmp_path / "c")
    assert run(capsys, "prune", folder, "--target", corpus, *needs)[0] == 0
    line = refused(capsys, "prune", folder, "--stats", stats, *needs, "--force")
    assert "hold no gram; calibrate with --gram" in line


def test_a_share_of_the_off_task_ability_is_kept_and_its_price_told(
    capsys, tmp_path, folder, corpus
):
    other, stats = tmp_path / "other.jsonl", tmp_path / "s"
    rows = [{"text": " ".join(f"w{3 + (7 * i + j * j) % 90}" for j in range(9))} for i in range(40)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = ("--target", corpus, "--distractor", other)
    options = ("--sparsity", 0.3, "--multiple-of", 16, "--quiet", "--keep-off-task", 0.5)
    status, text, _ = run(capsys, "prune", folder, *both, *options, "-o", tmp_path / "a")
    assert status == 0
    assert f"prunekit eval {tmp_path / 'a'} --baseline {folder} --data" in text
    wanted = ("--gram", "--gradients", "--off-task", "--quiet", "-o", stats)
    assert run(capsys, "calibrate", folder, *both, *wanted)[0] == 0
    assert run(capsys, "prune", folder, "--stats", stats, *options, "-o", tmp_path / "b")[0] == 0
    record = json.loads((tmp_path / "a" / "prunekit.json").read_text())
    assert record["recipe"]["keep_off_task"] == 0.5
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n).eval() for n in "ab")
    assert torch.equal(logits(one), logits(two))
    data = ("--baseline", folder, "--data", corpus, other, "--quiet")
    found = json.loads(run(capsys, "eval", tmp_path / "a", *data, "--json")[1])["loss"]
    assert [r["corpus"] for r in found] == [str(corpus), str(other)]
    assert all(r["rise"] == r["loss"] - r["dense"] for r in found)
    status, text, _ = run(capsys, "eval", tmp_path / "a", *data)
    assert status == 0
    assert f"{found[1]['rise']:+.4f}" in text


def test_tasks_are_solved_beside_the_dense_model(capsys, tmp_path, folder):
    from prunekit.integrations.loading import load, load_tokenizer
    from prunekit.tasks import evaluate_task, read_task

    rows = [{"prompt": f"w{i} w{i + 1}", "answer": "w5", "match": "contains"} for i in range(3, 12)]
    task = tmp_path / "words.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = tmp_path / "kept"
    options = ("--task", f"jsonl:{task}", "--baseline", folder, "--limit", 8, "--quiet")
    options += ("--generations", kept, "--max-new-tokens", 6, "--batch-size", 3)
    status, text, _ = run(capsys, "eval", folder, *options, "--samples", 2, "--json")
    facts = json.loads(text)["tasks"][0]
    made = read_task(f"jsonl:{task}", limit=8)
    model, words = load(folder), load_tokenizer(str(folder))
    alone = evaluate_task(model, words, made, max_new_tokens=6, quiet=True)
    assert status == 0
    assert facts["metrics"] == facts["dense"]["metrics"]
    assert facts["metrics"][0]["value"] == alone.accuracy
    assert sum(facts["failures"].values()) == 8 - sum(alone.correct)
    assert [sample["completion"] for sample in facts["samples"]] == [
        generation.text for generation in alone.generations[:2]
    ]
    assert sorted(path.name for path in kept.iterdir()) == [
        "words.baseline.jsonl",
        "words.model.jsonl",
    ]
    status, text, _ = run(capsys, "eval", folder, *options)
    assert status == 0
    assert "Tasks" in text
    assert text.count(f"{alone.accuracy:.4f}") >= 2


@pytest.mark.parametrize(
    ("options", "criterion"),
    [((), "reconstruction_fisher"), (("--compensate", "none"), "wanda")],
    ids=["repaired", "as it is"],
)
def test_the_default_criterion_is_recorded_by_its_name(
    options, criterion, capsys, tmp_path, folder, corpus
):
    given = ("--target", corpus, "--sparsity", 0.3, "--multiple-of", 16, "--quiet", *options)
    assert run(capsys, "prune", folder, *given, "-o", tmp_path / "a")[0] == 0
    recipe = pk.PrunePlan.load(tmp_path / "a" / "plan.safetensors").recipe
    assert recipe["criterion"] == criterion


def test_random_needs_no_data_and_a_plan_can_be_followed(capsys, tmp_path, folder):
    options = ("--strategy", "random", "--seed", 33, "--sparsity", 0.5, "--multiple-of", 16)
    assert run(capsys, "prune", folder, *options, "-o", tmp_path / "a")[0] == 0
    plan = tmp_path / "a" / "plan.safetensors"
    assert run(capsys, "prune", folder, "--plan", plan, "-o", tmp_path / "b")[0] == 0
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n).eval() for n in "ab")
    assert torch.equal(logits(one), logits(two))


def test_dry_run_writes_nothing(capsys, tmp_path, folder, corpus):
    options = ("--sparsity", 0.5, "--multiple-of", 16, "--dry-run", "--quiet")
    status, text, _ = run(capsys, "prune", folder, "--target", corpus, *options)
    assert status == 0
    assert "would keep 48 of 96" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("criterion", ["auto", "wanda"])
def test_a_budget_shares_out_what_uniform_would_keep(capsys, tmp_path, folder, corpus, criterion):
    """Whatever scores, Fisher shares out; the checkpoint's widths differ, and it is loaded."""
    options = ("--sparsity", 0.5, "--multiple-of", 8, "--compensate", "lstsq", "--quiet")
    given = ("--target", corpus, "--criterion", criterion, "--allocation", "budget", *options)
    status, text, _ = run(capsys, "prune", folder, *given, "--dry-run")
    assert status == 0
    out = tmp_path / "out"
    status, saved, _ = run(capsys, "prune", folder, *given, "-o", out)
    assert status == 0
    assert "loads with prunekit.load, vLLM with prunekit installed, or transformers'" in saved
    widths = [view.width for view in find_mlps(pk.load(out))]
    assert sum(widths) == 96
    assert len(set(widths)) == 2
    assert f"widths by layer: {widths[0]} {widths[1]}\n" in text
    status, text, _ = run(capsys, "inspect", out)
    assert status == 0
    assert f"{widths[0]}, {widths[1]}" in text


def test_a_budget_is_rehearsed_where_the_repair_is_sequential(capsys, tmp_path, folder, corpus):
    options = ("--sparsity", 0.5, "--multiple-of", 8, "--allocation", "budget", "--quiet")
    out = tmp_path / "out"
    status, text, _ = run(capsys, "prune", folder, "--target", corpus, *options, "-o", out)
    assert status == 0
    (line,) = [x for x in text.splitlines() if x.startswith("loss on prompts left out")]
    said = pk.PrunePlan.load(out / "plan.safetensors").recipe["rehearsed"]
    for name, verdict in said.items():
        shown = f"{name} {verdict['loss']:.4f}, {verdict['divergence']:.4f} from the dense model"
        assert shown in line
    better = min(said, key=lambda name: sum(said[name].values()))
    assert line.endswith(f"; took {better}")
    widths = {view.width for view in find_mlps(pk.load(out))}
    assert (len(widths) > 1) is (better == "budget")


def test_a_model_is_pruned_without_being_loaded(capsys, tmp_path, folder, corpus):
    """From statistics and by chance; what it gives is what loading the model gives."""
    stats, options = tmp_path / "s.stats", ("--sparsity", 0.4, "--multiple-of", 8, "--quiet")
    assert (
        run(capsys, "calibrate", folder, "--target", corpus, "--gram", "--quiet", "-o", stats)[0]
        == 0
    )
    for given in (
        ("--stats", stats, "--compensate", "lstsq"),
        ("--stats", stats, "--criterion", "rms", "--compensate", "none"),
        ("--strategy", "random", "--seed", 3),
    ):
        loaded, out = tmp_path / "loaded", tmp_path / "out"
        again = (*given, *options, "--force")
        assert run(capsys, "prune", folder, *again, "-o", loaded)[0] == 0
        status, text, _ = run(capsys, "prune", folder, *again, "--no-load", "-o", out)
        assert status == 0
        assert "pruned on disk: 41.67% of the neurons removed" in text
        assert torch.equal(logits(pk.load(out)), logits(pk.load(loaded)))
        assert (out / "tokenizer.json").exists()
        assert run(capsys, "inspect", out, "--verify")[0] == 0


def test_a_model_is_exported_for_every_sparsity(capsys, tmp_path, folder, corpus):
    stats, out, pruned = tmp_path / "s.stats", tmp_path / "out", tmp_path / "pruned"
    assert (
        run(capsys, "calibrate", folder, "--target", corpus, "--gram", "--quiet", "-o", stats)[0]
        == 0
    )
    given = ("--stats", stats, "--multiple-of", 8, "--quiet")
    status, text, _ = run(capsys, "export", folder, *given, "--anchor", 0.4, 0.6, "-o", out)
    assert status == 0
    assert "in the order of reconstruction" in text or "in the order of wanda" in text
    assert "repaired by sequential for 40%, 60%" in text
    assert run(capsys, "prune", folder, *given, "--sparsity", 0.4, "-o", pruned)[0] == 0
    assert torch.equal(logits(pk.load(out, sparsity=0.4)), logits(pk.load(pruned)))
    status, text, _ = run(capsys, "inspect", out)
    assert status == 0
    assert "nested" in text


def test_a_model_of_several_widths_is_exported_to_load_anywhere(capsys, tmp_path, folder):
    model = pk.load(folder)
    kept = tuple(torch.arange(k, dtype=torch.int32) for k in (16, 32))
    pk.prune(model, pk.PrunePlan(kept, (96, 96)))
    pk.save(model, load_tokenizer(folder), tmp_path / "uneven")
    out = tmp_path / "out"
    status, text, _ = run(capsys, "export", tmp_path / "uneven", "--format", "padded", "-o", out)
    assert status == 0
    assert "2 MLPs of 16 to 32 neurons, all 32 wide now" in text
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_a_model_too_large_for_memory_is_pruned_on_disk_unasked(
    capsys, tmp_path, folder, monkeypatch
):
    from prunekit.cli import streamed

    monkeypatch.setattr(streamed, "SHARE", 1e-9)
    given = ("--strategy", "random", "--sparsity", 0.4, "--multiple-of", 8, "--quiet")
    status, text, _ = run(capsys, "prune", folder, *given, "-o", tmp_path / "out")
    assert status == 0
    assert "pruned on disk" in text


def test_verifying_a_model_that_was_changed_exits_1(capsys, tmp_path, folder):
    out = pk.save(pk.load(folder), None, tmp_path / "out")
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    status, text, line = run(capsys, "inspect", out, "--verify")
    assert (status, text, line.count("\n")) == (1, "", 1)
    assert "is not what was written; get it anew" in line


def test_a_size_can_be_asked_for_instead_of_a_sparsity(capsys, tmp_path, folder, corpus):
    dense = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    given = ("--strategy", "random", "--target-bytes", dense - 20_000, "--multiple-of", 8)
    status, text, _ = run(capsys, "prune", folder, *given, "-o", tmp_path / "out", "--json")
    assert status == 0
    facts = json.loads(text)
    assert facts["bytes"] <= dense - 20_000
    recipe = pk.PrunePlan.load(tmp_path / "out" / "plan.safetensors").recipe
    assert recipe["target_bytes"] == str(dense - 20_000)


def test_a_speedup_can_be_asked_for_instead_of_a_sparsity(capsys, monkeypatch, folder):
    from prunekit.cli import prune
    from prunekit.experiment.goals import SpeedBySparsity

    speed = SpeedBySparsity((0.0, 0.5), (1.0, 2.0))
    monkeypatch.setattr(prune, "measure_speed", lambda model, multiple_of: speed)
    given = ("--strategy", "random", "--target-speedup", 1.6, "--multiple-of", 16, "--dry-run")
    status, text, _ = run(capsys, "prune", folder, *given)
    assert status == 0
    assert "decode speed-up measured here: 1.00 × at 0%, 2.00 × at 50%" in text
    assert "1.6 × needs 33.33%, interpolated between these" in text
    assert "would keep 64 of 96" in text


@pytest.mark.parametrize("verb", ["search", "prune"])
def test_a_search_prints_its_path_and_saves_what_it_found(capsys, tmp_path, folder, corpus, verb):
    given = ("--target", corpus, "--multiple-of", 32, "--quiet", "-o", tmp_path / "out")
    status, text, _ = run(capsys, verb, folder, *given, "--max-loss-rise", 10)
    assert status == 0
    assert "sequential   66.67%" in text
    assert "smallest that fits: 66.67% removed" in text
    record = json.loads((tmp_path / "out" / "prunekit.json").read_text())
    assert record["widths"] == [32, 32]
    assert record["results"]["search"]["found"]["repair"] == "sequential"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 32


def test_a_search_that_finds_nothing_writes_nothing_and_exits_1(
    capsys, monkeypatch, tmp_path, folder, corpus
):
    from prunekit.experiment import search

    monkeypatch.setattr(search, "smallest", lambda steps, trial: None)
    given = ("--target", corpus, "--max-loss-rise", 0.1, "--quiet", "-o", tmp_path / "out")
    status, text, _ = run(capsys, "search", folder, *given, "--json")
    assert status == 1
    assert json.loads(text)["found"] is None
    assert not (tmp_path / "out").exists()


def test_bench_prints_a_row_a_model_and_test(capsys, tmp_path, folder):
    options = ("--strategy", "random", "--sparsity", 0.5, "--multiple-of", 16)
    run(capsys, "prune", folder, *options, "-o", tmp_path / "small")
    sizes = ("--prompt", 8, "--generate", 2, "--rounds", 1, "--batch", "1,2", "--compact")
    status, text, _ = run(
        capsys, "bench", tmp_path / "small", "--baseline", folder, *sizes, "--json"
    )
    result = json.loads(text)
    assert status == 0
    assert len(result["rows"]) == 2 * 2 * 2
    assert all(line["peak_bytes"] > 0 for line in result["rows"])


BENCH = ("--prompt", 8, "--generate", 2, "--rounds", 1)


def test_bench_prunes_on_the_spot_and_says_what_that_can_give(capsys, folder):
    given = ("bench", folder, "--sparsity", "0.5", "--multiple-of", 16, *BENCH)
    status, text, _ = run(capsys, *given)
    assert status == 0
    why = [x for x in text.splitlines() if x.startswith(f"{folder} at 50")]
    assert [line.split(", ")[1:3] for line in why[-2:]] == [["fp32", "pp8"], ["fp32", "tg2"]]
    assert all("50% of their weights less can make it" in line for line in why[-2:])


def test_bench_rows_say_their_units(capsys, folder):
    given = ("bench", folder, "--sparsity", "0.5", "--multiple-of", 16, *BENCH)
    status, text, _ = run(capsys, *given, "--format", "csv")
    rows = list(csv.DictReader(text.splitlines()))
    assert status == 0
    assert [row["test"] for row in rows] == ["pp8", "pp8", "tg2", "tg2"]
    for row in rows:
        assert float(row["tokens_per_s_low"]) <= float(row["tokens_per_s"])
        latency = {"pp": "ttft_ms", "tg": "tpot_ms"}[row["test"][:2]]
        tokens = int(row["test"][2:]) if latency == "ttft_ms" else 1
        assert float(row[latency]) == pytest.approx(1e3 * tokens / float(row["tokens_per_s"]))
    assert (rows[0]["tpot_ms"], rows[-1]["ttft_ms"]) == ("", "")
    assert (rows[0]["bound"], float(rows[1]["bound"]) > 1) == ("", True)


@pytest.mark.slow
def test_bench_compares_within_each_dtype_and_draws_it(capsys, tmp_path, folder):
    page = tmp_path / "speed.html"
    given = ("bench", folder, "--neurons", "48", *BENCH)
    more = ("--dtype", "fp32,bf16", "--format", "jsonl", "--report", page)
    status, text, _ = run(capsys, *given, *more)
    rows = [json.loads(line) for line in text.splitlines()]
    assert status == 0
    assert [row["dtype"] for row in rows] == ["fp32"] * 4 + ["bf16"] * 4
    assert [row["bound"] is None for row in rows] == [True, False] * 4
    assert rows[0]["bytes"] == 2 * rows[4]["bytes"]
    html = page.read_text()
    assert html.count("<svg") == 4
    assert "50% of their weights less can make it" in html


@pytest.mark.parametrize("form", ["md", "csv", "jsonl"])
def test_rows_for_machines(capsys, form):
    given = [{"test": "pp8", "rate": 1.5, "bound": None}, {"test": "tg2", "rate": 2.5, "bound": 3}]
    Output(as_json=False).rows(form, given)
    lines = capsys.readouterr().out.splitlines()
    if form == "jsonl":
        assert [json.loads(line) for line in lines] == given
    elif form == "csv":
        rows = list(csv.DictReader(lines))
        assert rows[0] == {"test": "pp8", "rate": "1.5", "bound": ""}
    else:
        assert lines[1:] == ["| --- | --- | --- |", "| pp8 | 1.5 |  |", "| tg2 | 2.5 | 3 |"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--sparsity", "half"), "--sparsity: got 'half'; expected numbers such as 0.2,0.5"),
        (("--sparsity", "0.5", "--baseline", "x"), "leave --baseline out"),
        (("--sparsity", "1.5"), "sparsity: got 1.5"),
        (("--neurons", "97"), "--neurons: got 97; expected 1 to 96"),
        (("--neurons", "many"), "--neurons: got 'many'; expected numbers such as"),
        (("--batch", "a"), "--batch: got 'a'; expected numbers such as 1,8"),
        (("--save", "a.json", "--check", "b.json"), "save first, check later"),
        (("--check", "none.json", "--max-regression", "0"), "--max-regression: got 0.0"),
        (("--check", "none.json"), "none.json"),
        (("--save", "a.json", "--report", "a.html"), "--report: not with --save or --check"),
        (("--dtype", "fp32,fp8"), "--dtype: got 'fp8'; expected some of auto, bf16, fp16, fp32"),
        (("--dtype", "fp32,bf16", "--widths"), "--save, --check and --widths take one"),
        (("--llamacpp", "f16"), "--llamacpp: needs llama-cpp-python"),
        (("--report", "."), ".: is a folder"),
    ],
)
def test_bench_refuses(capsys, folder, given, why, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    status, _, error = run(capsys, "bench", folder, *given, *BENCH)
    assert status == 2
    assert why in error


def test_the_gate_passes_what_it_saved_and_fails_what_is_far_slower(
    capsys, tmp_path, folder, monkeypatch
):
    # Everything takes a tick: what is tried here is the gate, not the machine.
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(gate.Waiting, "share", lambda _: 0.0)
    path = tmp_path / "baseline.json"
    status, text, _ = run(capsys, "bench", folder, *BENCH, "--save", path)
    assert status == 0
    assert f"{path}: 4 tests" in text
    check = ("bench", folder, *BENCH, "--check", path, "--time-limit", 0)
    status, text, _ = run(capsys, *check, "--json")
    assert status == 0
    assert {v["verdict"] for v in json.loads(text)["verdicts"]} == {"ok"}
    saved = json.loads(path.read_text())
    first, *others = saved["ratios"]
    saved["ratios"][first] = [0.9 * ratio for ratio in saved["ratios"][first]]
    path.write_text(json.dumps(saved))
    status, text, error = run(capsys, *check)
    assert status == 1
    assert (text.count("regressed"), text.count(" ok")) == (1, len(others))
    assert error.rstrip().endswith(f"slower by more than 5%: {first}")


def test_env_names_what_serves_each_operation(capsys):
    status, text, _ = run(capsys, "env", "--json")
    facts = json.loads(text)
    assert status == 0
    assert set(facts["serving"].values()) <= {"reference", "cpp", "triton", "cuda"}
    assert "wanda" in facts["criteria"]
    lines = run(capsys, "env")[1].splitlines()
    assert sum(line.split()[:1] == ["gather_rows"] for line in lines) == 1


@pytest.mark.skipif("cpp" not in OPERATIONS["gated_mlp"].backends, reason="no C++ extension")
def test_env_names_the_tokens_that_the_decode_kernel_serves(capsys):
    with force_backend("cpp"):
        most = json.loads(run(capsys, "env", "--json")[1])["cpu_decode_tokens"]
        (row,) = (line for line in run(capsys, "env")[1].splitlines() if " gated_mlp " in line)
    with force_backend("reference"):
        assert json.loads(run(capsys, "env", "--json")[1])["cpu_decode_tokens"] is None

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, gate, down = (torch.zeros(*s, dtype=dtype) for s in ((17, 8), (6, 8), (8, 6)))
        serves = [n for n in range(1, 18) if decodes(x[:n], gate, gate, down, None, None, None)]
        assert serves == list(range(1, most + 1))
    wanted = f"cpp for 1 to {most} tokens, torch above" if most else "torch"
    assert row.rstrip().endswith("  " + wanted)


def test_help_teaches_by_example(capsys):
    status, text, _ = run(capsys, "--help")
    assert status == 0
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        status, text, _ = run(capsys, verb, "--help")
        assert status == 0
        assert f"examples:\n  prunekit {verb}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prune MODEL --target none.jsonl --sparsity 0.2 -o OUT", "none.jsonl: no such file"),
        ("prune MODEL --target BROKEN --sparsity 0.2 -o OUT", "broken.jsonl:2: is not JSON"),
        ("prune MODEL --target STRANGE --sparsity 0.2 -o OUT", "no usable column; have question"),
        ("prune MODEL --target EMPTY --sparsity 0.2 -o OUT", "the corpus is empty"),
        ("prune MODEL --target CORPUS --sparsity 1.0 -o OUT", "expected a fraction with 0 <"),
        ("prune MODEL --target CORPUS --sparsity 0 -o OUT", "needs a goal: one of --sparsity"),
        ("prune MODEL --target CORPUS --sparsity -1 -o OUT", "expected a fraction with 0 <"),
        ("prune MODEL --target CORPUS --sparsity x -o OUT", "invalid float value: 'x'"),
        (
            "prune MODEL --target CORPUS --sparsity 0.2 --criterion best -o OUT",
            "one of auto, fluct",
        ),
        ("prune MODEL --target CORPUS --sparsity 0.2 --criterion selectivity -o OUT", "distractor"),
        ("prune MODEL --target CORPUS --sparsity 0.2 --compensate magic -o OUT", "none, bias, lst"),
        (
            "prune MODEL --target CORPUS --sparsity 0.2 --keep-off-task 0.5 -o OUT",
            "--keep-off-task: needs --distractor FILE",
        ),
        (
            "prune MODEL --target CORPUS --distractor CORPUS --sparsity 0.2 --keep-off-task 2 "
            "-o OUT",
            "got 2.0; expected a weight from 0 to 1",
        ),
        (
            "prune MODEL --target CORPUS --distractor CORPUS --sparsity 0.2 --keep-off-task 0.5 "
            "--criterion selectivity -o OUT",
            "contrasts by itself",
        ),
        ("calibrate MODEL --target CORPUS --off-task -o OUT", "--off-task: needs --distractor"),
        ("prune MODEL --target CORPUS --sparsity 0.2 --multiple-of 0 -o OUT", "at least 1"),
        ("prune MODEL --target CORPUS --sparsity 0.2 -o MODEL", "exists and is not empty"),
        ("prune MODEL --target CORPUS --sparsity 0.2", "needs -o OUT"),
        ("prune MODEL --sparsity 0.2 -o OUT", "needs --target FILE or --stats STATS"),
        (
            "prune MODEL --target CORPUS --sparsity 0.2 --target-bytes 1MB -o OUT",
            "got --sparsity and --target-bytes; expected one of them",
        ),
        ("prune MODEL --target CORPUS --target-bytes lots -o OUT", "expected a size such as 200MB"),
        ("prune MODEL --target CORPUS --target-bytes 9 -o OUT", "got 9; expected at least"),
        ("prune MODEL --target CORPUS --target-bytes 1GB -o OUT", "already"),
        ("prune MODEL --target CORPUS --target-speedup 0.9 -o OUT", "expected more than 1"),
        ("prune MODEL --stats S --max-loss-rise 0.1 -o OUT", "takes no --stats; it searches"),
        ("search MODEL --target CORPUS --max-loss-rise 0.1", "needs --target FILE and -o OUT"),
        ("search MODEL --target CORPUS -o OUT", "max-loss-rise: got 0.0; expected nats a token"),
        (
            "search MODEL --target CORPUS --max-loss-rise 1 --criterion selectivity -o OUT",
            "needs distractors, which a search lacks",
        ),
        (
            "prune EXPERTS --target CORPUS --sparsity 0.2 --allocation budget -o OUT",
            "--allocation budget: its widths differ by layer; a checkpoint of this architecture",
        ),
        (
            "prune MODEL --strategy random --sparsity 0.2 --allocation budget --dry-run",
            "--allocation budget: needs --target FILE or --stats STATS",
        ),
        ("prune EXPERTS --plan UNEVEN -o OUT", "--plan: its widths differ by layer; a checkpoint"),
        ("prune MODEL --plan CORPUS -o OUT", "is no whole safetensors file"),
        ("export MODEL", "needs -o OUT"),
        ("export MODEL -o OUT", "--format nested: needs --stats STATS"),
        ("export MODEL --stats CORPUS --anchor 1.5 -o OUT", "expected a fraction"),
        ("export MODEL --format gif -o OUT", "invalid choice: 'gif'"),
        (
            "prune MODEL --target CORPUS --sparsity 0.2 --no-load -o OUT",
            "--no-load: --target runs the model; give --stats",
        ),
        ("prune MODEL --sparsity 0.2 --no-load -o OUT", "needs --target FILE or --stats STATS"),
        (
            "prune MODEL --stats CORPUS --sparsity 0.2 --compensate sequential --no-load -o OUT",
            "compensate sequential runs the model; expected one of none, bias, lstsq",
        ),
        (
            "prune demo --strategy random --sparsity 0.2 --no-load -o OUT",
            "is a GGUF file; expected a folder of safetensors",
        ),
        ("prune MODEL --plan PLAN -o OUT", "made for another model"),
        ("prune nowhere/at-all --target CORPUS --sparsity 0.2 -o OUT", "nowhere/at-all"),
        ("prune STRANGERS --target CORPUS --sparsity 0.2 -o OUT", "has no config.json"),
        ("calibrate MODEL --target CORPUS", "needs --target FILE and -o STATS"),
        ("calibrate MODEL --target CORPUS -o STRANGERS", "is a folder; give the name of a file"),
        ("eval MODEL", "needs --data FILE"),
        ("eval MODEL --data none.jsonl", "no such file"),
        ("eval MODEL --task humaneval", "pass --allow-code-execution"),
        ("eval MODEL --task gsm9k", "task: got 'gsm9k'; expected one of gsm8k:FILE, humaneval"),
        ("eval MODEL --task jsonl:none.jsonl", "none.jsonl: no such file"),
        ("eval MODEL --task arithmetic --batch-size 0", "--batch-size: got 0; expected at least 1"),
        ("eval MODEL --task arithmetic --limit -1", "limit: got -1; expected"),
        ("bench MODEL --batch one", "expected numbers such as 1,8"),
        ("inspect none", "no such file or folder"),
        ("inspect CORPUS", "is no whole safetensors file"),
        ("inspect STRANGERS", "was not written by prunekit"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("eval MODEL --frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_input_gives_one_line_and_exit_2(capsys, tmp_path, folder, corpus, arguments, message):
    from prunekit.plan import plan

    files = {"broken": '{"text": "w3"}\n{"tex', "strange": '{"question": "w3"}\n', "empty": ""}
    places = {"MODEL": folder, "CORPUS": corpus, "OUT": tmp_path / "out"}
    for name, content in files.items():
        places[name.upper()] = tmp_path / f"{name}.jsonl"
        places[name.upper()].write_text(content)
    places["STRANGERS"] = tmp_path / "strangers"
    (tmp_path / "strangers" / "x").mkdir(parents=True)
    places["PLAN"] = tmp_path / "plan"
    plan([torch.rand(128)] * 2, 0.5).save(places["PLAN"])
    if "EXPERTS" in arguments:
        places["EXPERTS"] = experts_folder(tmp_path / "experts", folder)
        places["UNEVEN"] = tmp_path / "uneven"
        uneven = tuple(torch.arange(k, dtype=torch.int32) for k in [16] * 4 + [32] * 4)
        pk.PrunePlan(uneven, (96,) * 8).save(places["UNEVEN"])
    line = refused(capsys, *(places.get(word, word) for word in arguments.split()))
    assert message in line
    assert not (tmp_path / "out").exists()


def experts_folder(path, folder):
    """A tiny mixture of experts, with another model's tokenizer."""
    import shutil

    tiny_model("mixtral").save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, path / name)
    return path


def test_an_unsupported_architecture_names_the_modules_seen(capsys, tmp_path, corpus, folder):
    import shutil

    model = tiny_model("llama", hidden_act="sigmoid")
    model.save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "m" / name)
    options = ("--target", corpus, "--sparsity", 0.2, "--quiet", "-o", tmp_path / "out")
    assert "is none of silu, gelu" in refused(capsys, "prune", tmp_path / "m", *options)


def test_no_verb_prints_help_and_python_m_works():
    done = subprocess.run([sys.executable, "-m", "prunekit"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "prunekit prune MODEL --target task.jsonl" in done.stdout
    command = [sys.executable, "-m", "prunekit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("prunekit ")
