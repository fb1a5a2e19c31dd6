"""The model card: front matter that the hub can read, and what it says of origin and licence."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import validate_repo_id

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.checkpoint import read_record
from prunekit.checkpoint.card import corpora
from prunekit.checkpoint.origin import Origin, origin
from prunekit.cli import main
from prunekit.plan import PrunePlan
from tests.models import tiny_model

QWEN = """---
license: other
license_name: qwen-research
license_link: LICENSE
---
# A model
"""


def dense(path, readme="", named=""):
    """A dense folder, as someone else wrote it."""
    tiny_model("llama").save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    if named:
        (path / "config.json").write_text(json.dumps(config | {"_name_or_path": named}))
    if readme:
        (path / "README.md").write_text(readme)
    return path


def pruned(source, out, **options):
    model = pk.load(source)
    scores = [torch.rand(view.width) for view in find_mlps(model)]
    pk.prune(model, pk.plan(scores, 0.5, multiple_of=8), compensate="none")
    return pk.save(model, None, out, **options)


def card_of(folder):
    """The front matter as the hub's own library reads it, and the text."""
    card = ModelCard.load(folder / "README.md")
    facts = metadata_load(folder / "README.md")
    assert card.data.to_dict() == facts
    assert facts["pipeline_tag"] == "text-generation"
    assert "prunekit" in facts["tags"]
    if "base_model" in facts:
        validate_repo_id(facts["base_model"])
    return facts, card.text


def test_a_folder_that_knows_its_hub_id_gives_link_and_licence(tmp_path):
    source = dense(tmp_path / "dense", "---\nlicense: apache-2.0\n---\n", "org/tiny-llama")
    facts, text = card_of(pruned(source, tmp_path / "out"))
    assert facts["library_name"] == "transformers"
    assert (facts["base_model"], facts["license"]) == ("org/tiny-llama", "apache-2.0")
    assert facts["tags"] == ["prunekit", "pruned"]
    assert (
        "50.00 % of the MLP neurons of [org/tiny-llama](https://huggingface.co/org/tiny-llama)"
        in text
    )
    assert "apache-2.0: that of [org/tiny-llama]" in text
    record = read_record(tmp_path / "out")
    assert (record["base_model"], record["license"]) == ("org/tiny-llama", "apache-2.0")


def test_a_licence_of_its_own_is_named_and_linked(tmp_path):
    source = dense(tmp_path / "dense", QWEN, "org/tiny")
    facts, text = card_of(pruned(source, tmp_path / "out"))
    assert (facts["license"], facts["license_name"]) == ("other", "qwen-research")
    assert facts["license_link"] == "https://huggingface.co/org/tiny/blob/main/LICENSE"
    assert f"qwen-research ({facts['license_link']}): that of" in text


@pytest.mark.parametrize("readme", ["", "# no front matter", "---\n{: [\n---\n", "---\n- a\n---\n"])
def test_of_what_nothing_is_known_nothing_is_claimed(readme, tmp_path):
    source = dense(tmp_path / "a|b", readme, "../somewhere")
    facts, text = card_of(pruned(source, tmp_path / "out"))
    assert not facts.keys() & {"base_model", "license", "license_name", "license_link"}
    assert "| dense model | a\\|b |" in text
    assert "The licence of a\\|b applies to this model too" in text
    assert str(tmp_path) not in text


def test_a_link_without_a_base_leads_nowhere_and_is_left_out(tmp_path):
    assert origin(str(dense(tmp_path / "m", QWEN))) == Origin(None, "other", "qwen-research")


def test_what_was_pruned_and_saved_again_still_tells_all(tmp_path, folder, capsys):
    source = dense(tmp_path / "dense", "---\nlicense: mit\n---\n", "org/tiny")
    for item in folder.glob("tokenizer*"):
        (source / item.name).write_bytes(item.read_bytes())
    model = pk.load(source)
    kept = tuple(torch.arange(k, dtype=torch.int32) for k in (16, 32))
    pk.prune(model, PrunePlan(kept, (96, 96)), compensate="none")
    first = pk.save(model, pk.integrations.loading.load_tokenizer(source), tmp_path / "uneven")
    again = pk.save(pk.load(first), None, tmp_path / "again")
    assert (again / "README.md").read_text() == (first / "README.md").read_text()
    out = tmp_path / "padded"
    assert main(["export", str(first), "--format", "padded", "-o", str(out)]) == 0
    facts, text = card_of(out)
    assert (facts["base_model"], facts["license"]) == ("org/tiny", "mit")
    assert "96 → 16 to 32, filled up with zeros to 32" in text
    assert read_record(out)["widths"] == [16, 32]


def test_recipe_corpora_and_results_stand_in_it(tmp_path, llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts, [texts[:7]], gram=True, quiet=True)
    recipe = {"criterion": "wanda", "keep_off_task": 0.25}
    plan = pk.plan(pk.score(stats, llama, "wanda"), 0.4, multiple_of=16, seed=5, recipe=recipe)
    pk.prune(llama, plan, stats=stats, compensate="lstsq")
    loss = {"corpus": "data/held.jsonl", "loss": 1.5, "stderr": 0.1, "tokens": 99}
    metric = {"task": "sums", "name": "accuracy", "value": 0.75, "stderr": 0.03, "n_shot": 0}
    results = {"loss": [loss], "dense_loss": {"loss": 1.25}}
    results["tasks"] = [{"metrics": [metric], "problems": 200}]
    folder = pk.save(llama, None, tmp_path / "out", results=results)
    _, text = card_of(folder)
    for class_name, count in (("target", 60), ("distractor", 7)):
        (seen,) = (c for c in stats.provenance["corpora"] if c["class"] == class_name)
        row = f"| {class_name} | {seen['name']} | {count} | {seen['tokens']} | {seen['hash']} |"
        assert row in text
    for row in (
        "| sparsity asked for / reached | 0.4 / 0.3333 |",
        "| criterion, strategy, allocation | wanda, selective, uniform |",
        "| repair | lstsq |",
        "| multiple of | 16 |",
        "| seed | 5 |",
        "| keep off task | 0.25 |",
        f"| statistics | {stats.hash} |",
        "| held.jsonl | 1.5000 | 0.1000 | 1.2500 | +0.2500 | 99 |",
        "| sums | accuracy | 0.7500 | 0.0300 | 200 |",
    ):
        assert row in text, row
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("|---"):  # a table's head, rule and rows have as many columns
            assert lines[i - 1].count("|") == line.count("|") == lines[i + 1].count("|"), line


def test_the_corpora_of_merged_calibrations_are_all_there(llama, tokenizer, texts):
    one, other = (pk.calibrate(llama, tokenizer, t, quiet=True) for t in (texts[:9], texts[9:]))
    found = list(corpora(one.merge(other).provenance))
    assert [c["prompts"] for c in found] == [9, 51]


def test_a_dense_model_is_called_no_pruned_one(tmp_path):
    facts, text = card_of(pk.save(pk.load(dense(tmp_path / "m")), None, tmp_path / "out"))
    assert facts["tags"] == ["prunekit"]
    assert "pruned" not in text


def test_a_gguf_file_tells_licence_and_source(tmp_path):
    from gguf import GGUFWriter

    def written(name, **facts):
        writer = GGUFWriter(tmp_path / name, "llama")
        for key, value in facts.items():
            writer.add_string("general." + key.replace("__", "."), value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return origin(str(tmp_path / name))

    link = "https://huggingface.co/org/tiny"
    assert written("a.gguf", license="mit", source__repo_url=link) == Origin("org/tiny", "mit")
    assert written("b.gguf", base_model__0__repo_url=f"{link}/") == Origin("org/tiny")
    assert written("c.gguf", source__repo_url="https://example.org/org/tiny") == Origin()


def test_the_embedded_model_has_a_base_and_a_licence(demo_model):
    model, _ = demo_model
    assert model.origin == Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


@pytest.mark.parametrize("option", [[], ["--no-load"]])
def test_a_hub_id_is_the_base_and_its_cached_readme_has_the_licence(option, tmp_path, folder):
    home = tmp_path / "hub" / "models--org--tiny-llama"
    snapshot = home / "snapshots" / ("0" * 40)
    dense(snapshot, "---\nlicense: llama3.2\n---\n")
    for item in folder.glob("tokenizer*"):
        (snapshot / item.name).write_bytes(item.read_bytes())
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "prunekit", "prune", "org/tiny-llama", "-o", str(out)]
    command += ["--strategy", "random", "--sparsity", "0.5", "--multiple-of", "8", *option]
    place = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts, _ = card_of(out)
    assert (facts["base_model"], facts["license"]) == ("org/tiny-llama", "llama3.2")
    assert read_record(out)["model"] == "org/tiny-llama"
    assert origin(str(snapshot)) == Origin("org/tiny-llama", "llama3.2")
